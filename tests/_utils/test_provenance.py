from __future__ import annotations

import json
import platform
from importlib.metadata import version

import torch

from captum_intramodal import __version__
from captum_intramodal._utils.provenance import describe_model, versions
from tests.testing.tiny import tiny


def test_versions_of_installed_and_missing_packages() -> None:
    assert versions(["torch", "no-such-package"]) == {
        "captum_intramodal": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "no-such-package": None,
    }


def test_a_description_is_json_and_follows_the_model() -> None:
    model, _ = tiny("llava")
    model.config._name_or_path, model.config._commit_hash = "somewhere/llava", "abc"
    description = describe_model(model)
    assert description == {
        "id": "somewhere/llava",
        "revision": "abc",
        "class": "LlavaForConditionalGeneration",
        "dtype": "float32",
    }
    assert describe_model(model.to(torch.bfloat16))["dtype"] == "bfloat16"
    described = describe_model(model, weights=True)
    assert json.loads(json.dumps(described)) == described
    assert described["attention"] == model.config._attn_implementation


def test_the_fingerprint_follows_the_weights() -> None:
    model, same, other = tiny("llava")[0], tiny("llava")[0], tiny("llava", seed=1)[0]
    first = describe_model(model, weights=True)["weights_crc32"]
    assert describe_model(same, weights=True)["weights_crc32"] == first
    assert describe_model(other, weights=True)["weights_crc32"] != first
    with torch.no_grad():
        next(same.parameters()).flatten()[0] += 1
    assert describe_model(same, weights=True)["weights_crc32"] != first
    assert describe_model(model.to("meta"), weights=True)["weights_crc32"] != first
