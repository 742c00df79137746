r"""Which box of the original image does each visual token cover? Measured on the model, not looked up per family.

:mod:`~captum_intramodal.geometry.measure` describes the method.
"""

from captum_intramodal.geometry.cache import cached_geometry, cached_pixels, geometry_key
from captum_intramodal.geometry.decoder_inputs import state_rows, visual_rows
from captum_intramodal.geometry.measure import measure_geometry
from captum_intramodal.geometry.oracle import geometry_oracle
from captum_intramodal.geometry.pixel_map import PixelMap, PixelMaps
from captum_intramodal.geometry.pixel_probe import measure_pixels
from captum_intramodal.geometry.raster import expected_raster
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.placeholders import image_token_id, visual_positions

__all__ = [
    "PixelMap",
    "PixelMaps",
    "TokenGeometry",
    "cached_geometry",
    "cached_pixels",
    "expected_raster",
    "geometry_key",
    "geometry_oracle",
    "image_token_id",
    "measure_geometry",
    "measure_pixels",
    "state_rows",
    "visual_positions",
    "visual_rows",
]
