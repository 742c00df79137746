r"""Bring an input and its arguments to another scale, and attributions back: the pyramids of MSEA."""

from captum_intramodal.attr.pyramids.base import Pyramid
from captum_intramodal.attr.pyramids.low_pass import LowPass
from captum_intramodal.attr.pyramids.reprocess import Reprocess
from captum_intramodal.attr.pyramids.resize import Resize

__all__ = ["LowPass", "Pyramid", "Reprocess", "Resize"]
