"""Explainers that wrap Captum's methods."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam, Occlusion

from captum_intramodal import PixelForward, VisualTokenAttribution
from captum_intramodal.explainers import make_explainer
from tests.explainers.helpers import PROMPT, answer_to, model_of
from tests.testing.tiny import random_image


def test_grad_cam_is_captums() -> None:
    adapter, image, ids = model_of("qwen2_vl"), random_image(112, 84), answer_to(model_of("qwen2_vl"))
    forward = PixelForward(adapter, PROMPT, ids, "log_probs")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    method = VisualTokenAttribution(LayerGradCam(forward, adapter.model.get_decoder().layers[1]))
    expected = torch.cat([method.attribute(pixels, target=target)[0] for target in forward.targets])
    (maps,) = make_explainer("grad_cam:layer=1")(adapter, [image], PROMPT, ids)
    assert torch.allclose(maps, expected.clamp_min(0), atol=1e-6)
    (quiet,) = make_explainer("llava_cam:layer=1,noise=0,samples=2")(adapter, [image], PROMPT, ids)
    assert torch.allclose(quiet, maps, atol=1e-5)


def test_pixel_methods_are_captums() -> None:
    adapter, image, ids = model_of("llava"), random_image(112, 112), answer_to(model_of("llava"))
    forward = PixelForward(adapter, PROMPT, ids, "log_probs")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean = torch.from_numpy(np.rint(np.array(image).mean((0, 1)))).float().reshape(1, 3, 1, 1) / 255
    target = forward.targets[2]
    gradients = IntegratedGradients(forward).attribute(pixels, target=target, n_steps=3, internal_batch_size=1)
    (maps,) = make_explainer("integrated_gradients:n_steps=3,cells=8")(adapter, [image], PROMPT, ids)
    assert torch.allclose(maps[2], F.avg_pool2d(gradients.detach().sum(1), 14)[0].clamp_min(0), atol=1e-6)
    hidden = Occlusion(forward).attribute(
        pixels, (3, 56, 56), strides=(3, 28, 28), target=target, baselines=mean.expand_as(pixels)
    )
    (maps,) = make_explainer("occlusion:window=0.5,cells=8")(adapter, [image], PROMPT, ids)
    assert torch.allclose(maps[2], F.avg_pool2d(hidden.sum(1), 14)[0].clamp_min(0), atol=1e-4)
