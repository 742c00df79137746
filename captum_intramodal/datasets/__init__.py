r"""Images with prompts, answers and object masks to evaluate explanations on, from scenes, COCO, TAM or a folder.

A data set has ``settings``, a length and samples (see :class:`EvaluationDataset`). :func:`open_dataset` opens one from
text: by a registered name, or by the dotted name of its class, which then needs no registration::

    @register_dataset("pets")
    class Pets:
        settings = {"name": "pets"}

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return Sample(f"pet-{range(2)[index]}", Path(f"pets/{index}.png"), "what is this?", categories={...})

Another package registers its class by an entry point of the group ``captum_intramodal.datasets``.
"""

from captum_intramodal.datasets.base import EvaluationDataset, Sample
from captum_intramodal.datasets.coco import CocoDataset
from captum_intramodal.datasets.folder import FolderDataset
from captum_intramodal.datasets.opening import open_dataset
from captum_intramodal.datasets.registry import DATASETS, register_dataset
from captum_intramodal.datasets.scenes import SceneDataset
from captum_intramodal.datasets.tam import TAMDataset

__all__ = [
    "DATASETS",
    "CocoDataset",
    "EvaluationDataset",
    "FolderDataset",
    "Sample",
    "SceneDataset",
    "TAMDataset",
    "open_dataset",
    "register_dataset",
]
