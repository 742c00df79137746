from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from captum_intramodal._utils.image import (
    blur_image,
    check_images,
    image_to_tensor,
    noise_image,
    resize_images,
    stack_frames,
    tensor_to_image,
)
from captum_intramodal.errors import InvalidInputError


def test_images_are_listed_in_rgb() -> None:
    gray, transparent = Image.new("L", (3, 2), 7), Image.new("RGBA", (4, 5))
    assert [image.mode for image in check_images([gray, transparent])] == ["RGB", "RGB"]
    (single,) = check_images(gray)
    assert single.getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize(("images", "got"), [([], "none"), (["photo.png"], "str"), (np.zeros((1, 2, 2, 3)), "ndarray")])
def test_anything_but_images_is_refused(images: object, got: str) -> None:
    with pytest.raises(TypeError, match=rf"one or several PIL images, got .*{got}.*; open a file with PIL"):
        check_images(images)  # type: ignore[arg-type]


def test_tensors_hold_the_image() -> None:
    image = noise_image((5, 4), 1)
    pixels = image_to_tensor(image)
    assert pixels.shape == (1, 3, 4, 5) and pixels.dtype == torch.float32
    assert torch.equal(pixels[0, 2], torch.tensor(np.asarray(image)[..., 2] / 255, dtype=torch.float32))
    assert tensor_to_image(pixels[0]) == image


def test_every_8_bit_level_survives_a_tensor() -> None:
    levels = torch.arange(256.0).reshape(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(image_to_tensor(tensor_to_image(levels / 255))[0] * 255, levels)


def test_tensors_are_rounded_and_clamped() -> None:
    pixels = torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 254.4 / 255, 1.2]).expand(3, 1, 5).requires_grad_()
    assert np.asarray(tensor_to_image(pixels))[0, :, 0].tolist() == [0, 0, 1, 254, 255]


def test_frames_are_stacked() -> None:
    images = [noise_image((5, 4), seed) for seed in range(3)]
    video = stack_frames(images)
    assert video.shape == (3, 3, 4, 5) and video.dtype == torch.uint8
    assert torch.equal(video[1] / 255, image_to_tensor(images[1])[0])
    tensors = [torch.rand(3, 4, 5) for _ in range(2)]
    assert torch.equal(stack_frames(tensors), torch.stack(tensors))
    with pytest.raises(InvalidInputError, match=r"one size, got \[\(4, 5\), \(5, 4\)\]"):
        stack_frames([noise_image((5, 4)), noise_image((4, 5))])


def test_resizing_leaves_an_image_of_the_right_size_alone() -> None:
    image, other = noise_image((6, 4)), noise_image((8, 8))
    same, larger = resize_images([image, other], [(6, 4), (4, 12)])
    assert same is image and larger == other.resize((4, 12), Image.Resampling.BICUBIC)
    with pytest.raises(ValueError, match="zip"):
        resize_images([image], [])


@pytest.mark.parametrize(("use", "radius"), [("imputation", 3.2), ("baseline", 3.0)])
def test_the_radius_of_a_blur_depends_on_its_use(use: str, radius: float) -> None:
    image = noise_image((48, 32))
    assert blur_image(image, use) == image.filter(ImageFilter.GaussianBlur(radius))  # type: ignore[arg-type]


def test_noise_follows_its_seed_or_generator() -> None:
    assert noise_image((7, 5), 2) == noise_image((7, 5), 2) != noise_image((7, 5), 3)
    assert noise_image((7, 5)).size == (7, 5) and noise_image((7, 5)).mode == "RGB"
    generator = torch.Generator().manual_seed(0)
    first, second = noise_image((7, 5), generator), noise_image((7, 5), generator)
    assert first != second and first == noise_image((7, 5), torch.Generator().manual_seed(0))
