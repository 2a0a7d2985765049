"""Runs the same slice of every campaign, and every input that once found something."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.hostile.campaign import CORPUS
from tests.hostile.campaigns import CAMPAIGNS

if TYPE_CHECKING:
    from trio.testing import MockClock

    from tests.hostile.campaign import Campaign

KEPT = {
    f"{campaign.name}-{file.name}": (campaign, file.read_bytes())
    for campaign in CAMPAIGNS
    for file in campaign.corpus()
}


def test_every_corpus_belongs_to_a_campaign() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {c.name for c in CAMPAIGNS}


@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=lambda c: c.name)
async def test_slice(campaign: Campaign, autojump_clock: MockClock) -> None:
    random = Random(1)
    async with campaign.open() as check:
        for _ in range(campaign.slice_inputs):
            await check(campaign.make(random))


@pytest.mark.parametrize("name", KEPT)
async def test_kept(name: str, autojump_clock: MockClock) -> None:
    campaign, data = KEPT[name]
    async with campaign.open() as check:
        await check(data)
