"""Records of one evaluation and their leaderboard, which several tests read."""

from __future__ import annotations

from typing import Any

import pytest

from captum_intramodal.evaluation import Leaderboard, make_leaderboard
from tests.evaluation.helpers import COLUMNS, N, make_records


@pytest.fixture(scope="session")
def records() -> list[Any]:
    return make_records()


@pytest.fixture(scope="session")
def board(records: list[Any]) -> Leaderboard:
    return make_leaderboard(records, COLUMNS, n=N, seed=4)
