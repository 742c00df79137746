r"""A model and its processor as one object: prompts, generation, teacher-forced passes, probabilities of answers."""

from captum_intramodal._utils.image import check_images
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt, stack_inputs
from captum_intramodal.adapter.trials import logits_gap

__all__ = ["AnswerScorer", "Encoding", "ModelAdapter", "Prompt", "check_images", "logits_gap", "stack_inputs"]
