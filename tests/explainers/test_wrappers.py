"""MSEA and ARC around any explainer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image

from captum_intramodal import ARC
from captum_intramodal.explainers import make_explainer
from tests.explainers.helpers import PROMPT, answer_to, model_of
from tests.testing.tiny import random_image


def test_msea_around_another_explainer_by_hand() -> None:
    adapter, image, ids = model_of("qwen2_vl"), random_image(112, 84), answer_to(model_of("qwen2_vl"))
    (maps,) = make_explainer("msea+attention:scales=[1,2],scale_weights=[3,1],layer=0")(adapter, [image], PROMPT, ids)
    base = make_explainer("attention:layer=0")
    (small,) = base(adapter, [image], PROMPT, ids)
    (large,) = base(adapter, [image.resize((224, 168), Image.Resampling.BICUBIC)], PROMPT, ids)
    expected = 0.75 * F.interpolate(small[None], large.shape[1:], mode="bilinear")[0] + 0.25 * large
    assert torch.allclose(maps, expected, atol=1e-6)


def test_arc_around_another_explainer_by_hand() -> None:
    adapter, image, ids = model_of("qwen2_vl"), random_image(112, 84), answer_to(model_of("qwen2_vl"))
    explainer = make_explainer("arc+random:k=7,layers=[0],seed=3")
    (maps,) = explainer(adapter, [image], PROMPT, ids)
    encoding = adapter.encode(adapter.prepare([image], PROMPT), ids)
    arc = ARC(model=adapter.model, k=7, layers=[0])
    start = encoding.prompt_length
    context = arc.context(encoding.inputs, torch.arange(start, start + len(ids)))
    (base,) = make_explainer("random:seed=3")(adapter, [image], PROMPT, ids)
    assert torch.allclose(maps, arc.suppress(base, context), atol=1e-6)
    assert make_explainer("msea+arc+random").name == "msea+arc+random"
    assert make_explainer("msea+arc+random:k=3,scales=[1,2],seed=4").settings["base"]["base"]["seed"] == 4
