"""From figures to a verdict: limits derived from the arithmetic and the flow's own reach, and rows held to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow_fast.verify.amplification import Amplification
from tarflow_fast.verify.jacobian import Autograd
from tarflow_fast.verify.report import BLOCKS, JACOBIAN, LOG_DET, ROUND_TRIP, FlowReport, Row
from tarflow_fast.verify.trip import Trip

__all__ = ["Judge"]


@dataclass(frozen=True)
class Judge:
    """Holds the figures of a flow to what rounding may cost.

    m roundings follow one another in a block. Each moves the tokens by at most u times their largest number in the
    forward pass, by v times in the inverse, and the reach says how far that goes by the end. However far it goes, half
    of the digits have to be left: sqrt(2 max(u, v)) of the largest number is the limit above all others.

    data: the trips x -> z -> x. noise: the trips z -> x -> z. autograd: None where it was not measured, for `why`.
    scaled: whether the blocks have log-scales.
    """

    facts: dict[str, Any]
    m: int
    u: float
    v: float
    reach: Amplification
    data: Trip
    noise: Trip
    autograd: Autograd | None
    why: str
    scaled: bool

    def report(self) -> FlowReport:
        """The rows, the notes below them, and a sentence for everything past its limit."""
        trips, log_dets, blocks, jacobians = self._trips(), self._log_dets(), self._blocks(), self._jacobians()
        made_of = {
            "roundings": self.m, "roundoff_forward": self.u, "roundoff_inverse": self.v,
            "reach_x": self.reach.to_x, "reach_z": self.reach.to_z, "reach_log_det": self.reach.to_log_det,
        }  # fmt: skip
        failed = [*_overflows(blocks), *self._failed_trips(trips)]
        failed += [*self._failed_log_dets(log_dets), *_failed_jacobians(jacobians)]
        rows = [*trips, *log_dets, *blocks, *jacobians]
        return FlowReport(rows, self.facts | made_of, self._notes(), failed)

    # ---- the limits

    def _limit(self, reach: float, largest: float) -> float:
        """Of forward and inverse, one after the other."""
        return min(self.m * (self.u + self.v) * reach, math.sqrt(2 * max(self.u, self.v)) * largest)

    def _autograd_limit(self) -> float:
        """Of forward's log-determinant against float64's: the forward pass alone has rounded, and float64 a little."""
        sum_a = _largest(self.data.sum_a)
        rounded = min(self.m * self.u * (self.reach.to_log_det + sum_a), math.sqrt(2 * self.u) * sum_a)
        return rounded + self.autograd.rounding.sum(dim=1).max().item()

    # ---- the rows

    def _trips(self) -> list[Row]:
        rows = []
        for name, trip, reach in (
            ("x -> z -> x", self.data, self.reach.to_x),
            ("z -> x -> z", self.noise, self.reach.to_z),
        ):
            error, most = trip.error, _most(trip.error)
            limit = self._limit(reach, _largest(trip.largest)) if self.reach.rows else None
            rows.append({
                "section": ROUND_TRIP, "name": name, "rows": len(error), "median": error.median().item(), "p999": most,
                "limit": limit, "largest": error.max().item(), "over_1e-3": _share(error > 1e-3),
                "over_1e-2": _share(error > 1e-2), "ok": limit is not None and most <= limit,
            })  # fmt: skip
        return rows

    def _log_dets(self) -> list[Row]:
        measured = []
        for name, trip in (("x -> z -> x", self.data), ("z -> x -> z", self.noise)):
            sum_a = _largest(trip.sum_a)  # log-scales round too
            limit = self._limit(self.reach.to_log_det + sum_a, sum_a) if self.reach.rows else None
            measured.append((f"forward + inverse, {name}", trip.log_dets, limit))
        if self.autograd is not None:
            measured.append(("forward - autograd", self.autograd.off, self._autograd_limit()))
        rows, dims = [], self.facts["tokens"] * self.facts["token_size"]
        for name, by_block, limit in measured:
            values = by_block.sum(dim=1).abs().nan_to_num(nan=torch.inf)
            median, largest = values.median().item(), values.max().item()
            rows.append({
                "section": LOG_DET, "name": name, "rows": len(values), "median": median, "largest": largest,
                "limit": limit, "median_per_dim": median / dims, "largest_per_dim": largest / dims,
                "ok": limit is not None and largest <= limit,
            })  # fmt: skip
        return rows

    def _blocks(self) -> list[Row]:
        rows, both, measured = [], (self.data, self.noise), self.reach.rows > 0
        for k in range(self.facts["blocks"]):
            overflow = {
                f"{way}_overflow": _share(torch.cat([getattr(trip, f"{way}_overflow")[:, k] for trip in both]))
                for way in ("inverse", "forward")
            }
            met = self.scaled and any(share is not None for share in overflow.values())
            rows.append({
                "section": BLOCKS, "name": f"block {k}",
                "largest_a": max(trip.a[:, k].max().item() for trip in both) if met else None,
                "inverse_stretch": self.reach.inverse_stretch[k].item() if measured else None,
                "forward_stretch": self.reach.forward_stretch[k].item() if measured else None, **overflow,
                "error_x": _most(self.data.apart[:, k]), "error_z": _most(self.noise.apart[:, k]),
                "ok": not any(overflow.values()),
            })  # fmt: skip
        return rows

    def _jacobians(self) -> list[Row]:
        if self.autograd is None:
            return []
        rows, limit = [], self._autograd_limit()
        for k in range(self.facts["blocks"]):
            above, off = self.autograd.above[:, k].max().item(), self.autograd.off[:, k].abs().max().item()
            rows.append({
                "section": JACOBIAN, "name": f"block {k}", "rows": len(self.autograd.off), "above_diagonal": above,
                "log_det_off": off, "limit": limit, "ok": above == 0 and off <= limit,
            })  # fmt: skip
        return rows

    # ---- the words

    def _notes(self) -> dict[str, str]:
        reach = f"{self.reach.to_x:.3g} for x and {self.reach.to_z:.3g} for z"
        half = math.sqrt(2 * max(self.u, self.v))
        missing = "" if self.autograd is not None else f"\nNothing was compared with autograd: {self.why}."
        return {
            ROUND_TRIP: f"Limit: m (u + v) times the reach, which is {reach}, and at most {half:.3g} times the largest "
            f"number,\nwhich is half of its digits. m = {self.m} roundings in a block, unit roundoff u = {self.u:.3g} "
            f"forward, v = {self.v:.3g} inverse.",
            LOG_DET: f"Limit: m (u + v) times the reach, which is {self.reach.to_log_det:.3g}, plus the largest sum of "
            f"abs(a), and at most {half:.3g} times\nthat sum. Against autograd u stands alone, plus what float64 "
            f"itself may have lost, 2^-53 (1 + abs(log)) for each number on the diagonal.{missing}",
            BLOCKS: "A stretch is the largest ratio of what a block makes of a small change to that change, in random "
            "directions. The\nerror of x, or z, in 99.9 % of the rows, is that of the round trip once the block is "
            "passed on the way back.",
            JACOBIAN: "In float64, tokens in the order of the block. Off is the forward's own log-determinant.",
        }

    def _failed_trips(self, rows: list[Row]) -> list[str]:
        sentences = []
        for row, trip, floor in zip(rows, (self.data, self.noise), (self.v, self.u), strict=True):
            if row["ok"]:
                continue
            if row["limit"] is None or not math.isfinite(row["p999"]):  # `_overflows` names the block
                lost = 100 * _share(trip.error.isinf())
                sentences.append(f"{row['name']}: {lost:.3g} % of the rows do not come back finite")
                continue
            errors = [_most(trip.apart[:, k]) for k in range(self.facts["blocks"])]
            way_back = [*range(len(errors))][:: -1 if trip is self.data else 1]
            before = dict(zip(way_back, [0.0, *(errors[k] for k in way_back)], strict=False))
            worst = max(way_back, key=lambda k: errors[k] / max(before[k], floor * _largest(trip.largest)))
            sentences.append(
                f"{row['name']}: the error is {row['p999']:.3g}, the limit {row['limit']:.3g}; it grows most in block "
                f"{worst}"
            )
        return sentences

    def _failed_log_dets(self, rows: list[Row]) -> list[str]:
        by_block, sentences = [self.data.log_dets, self.noise.log_dets], []
        if self.autograd is not None:
            by_block.append(self.autograd.off)
        for row, values in zip(rows, by_block, strict=True):
            if not row["ok"] and row["limit"] is not None and math.isfinite(row["largest"]):
                sentences.append(
                    f"{row['name']}: up to {row['largest']:.3g} nats, the limit is {row['limit']:.3g}; most in block "
                    f"{values.abs().amax(dim=0).argmax()}"
                )
            elif not row["ok"]:
                sentences.append(f"{row['name']}: the log-determinants are not finite")
        return sentences


def _overflows(rows: list[Row]) -> list[str]:
    sentences = []
    for row in rows[::-1]:  # the inverse comes to the last block first, and what overflows there may spoil the others
        for way in ("inverse", "forward"):
            if share := row[f"{way}_overflow"]:
                a = "" if row["largest_a"] is None else f", where abs(a) is up to {row['largest_a']:.3g}"
                sentences.append(f"{row['name']}: the {way} overflows in {100 * share:.3g} % of the rows{a}")
    return sentences


def _failed_jacobians(rows: list[Row]) -> list[str]:
    sentences = []
    for row in rows:
        if row["above_diagonal"]:
            sentences.append(
                f"{row['name']}: the Jacobian is not triangular, {row['above_diagonal']:.3g} stands where 0 should"
            )
        if not row["log_det_off"] <= row["limit"]:
            sentences.append(
                f"{row['name']}: the log-determinant is {row['log_det_off']:.3g} nats off autograd's, the limit is "
                f"{row['limit']:.3g}"
            )
    return sentences


def _most(values: Tensor) -> float:
    """What 99.9 % of the values (n,) do not exceed: one of them, the largest where there are fewer than 1000."""
    return values.quantile(0.999, interpolation="higher").item()


def _share(values: Tensor) -> float | None:
    """The mean of zeros and ones, NaN left out; None where nothing is left."""
    values = values.double()
    return values.nanmean().item() if not values.isnan().all() else None


def _largest(values: Tensor) -> float:
    """The largest finite one, or 0."""
    return values[values.isfinite()].max().item() if values.isfinite().any() else 0.0
