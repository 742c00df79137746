"""Captum attributions: MSEA, ARC, the logit lens as a layer attribution, and models as functions of their images."""
