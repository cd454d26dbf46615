"""What a fleet of fine-tunes takes in all, by each way to keep it. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nps_compress.bench.figures import Figure, row
from nps_compress.bench.peers import PEERS
from nps_compress.errors import InvalidArgumentError

OURS, DENSE = "nps-compress", "dense copies"
LORA_BYTES = 2  # of a parameter, bf16


@dataclass(frozen=True)
class Plan:
    """What is assumed of a deployment.

    ``downloads``: times that a task goes over the network, over all machines and tasks.
    ``egress_price``: USD for 10^9 bytes. ``bandwidth``: 10^9 bits a second. ``resident``: tasks
    on one machine.
    """

    tasks: int
    downloads: int
    machines: int = 1
    egress_price: float = 0.09
    resident: int = 8
    bandwidth: float = 10.0
    lora_rank: int = 16

    def __post_init__(self) -> None:
        for name in ("tasks", "machines", "resident", "lora_rank"):
            if not 1 <= getattr(self, name) <= 10**9:
                raise InvalidArgumentError(name, getattr(self, name), "from 1 to 10^9")
        if not 0 <= self.downloads <= 10**12:
            raise InvalidArgumentError("downloads", self.downloads, "from 0 to 10^12")
        if not 0 <= self.egress_price < math.inf:
            raise InvalidArgumentError("egress price", self.egress_price, "0 or more USD per GB")
        if not 0 < self.bandwidth < math.inf:
            raise InvalidArgumentError("bandwidth", self.bandwidth, "over 0 Gbit/s")


@dataclass(frozen=True)
class One:
    """One task of the fleet: bytes, parameters and seconds, on average over what was measured."""

    base_bytes: float
    dense_bytes: float
    file_bytes: float
    changed_bytes: float
    lora_params: float
    load: float
    plain_load: float
    switch: float


@dataclass(frozen=True)
class Method:
    """One way to keep a fleet. Bytes, and seconds that start after the download.

    ``base_bytes``: kept once, beside all tasks. ``private_bytes``: weights that a task in use has
    in memory for itself, beyond its ``task_bytes``. ``start``, ``warm_start``: from disk into
    memory, without and with the base there already; None where that was not measured.
    """

    name: str
    task_bytes: float
    base_bytes: float
    private_bytes: float
    start: float | None = None
    warm_start: float | None = None
    reported: bool = False

    def disk(self, tasks: float) -> float:
        """Bytes of so many tasks and what they need."""
        return self.base_bytes + tasks * self.task_bytes

    def egress(self, plan: Plan) -> float:
        """Bytes over the network: each download, and the base once for each machine."""
        return plan.machines * self.base_bytes + plan.downloads * self.task_bytes

    def at_hand(self, tasks: float) -> float:
        """Bytes of memory with so many tasks packed in it, of which one is in use."""
        return self.disk(tasks) + self.private_bytes

    def at_once(self, tasks: float, dense_bytes: float) -> float:
        """Bytes of memory with so many tasks in use. What is rebuilt needs no base any more, and
        shares only what no task changes."""
        if not self.private_bytes:
            return self.disk(tasks)
        return dense_bytes - self.private_bytes + tasks * self.private_bytes

    def transfer(self, plan: Plan) -> float:
        """Seconds to download one task."""
        return 8 * self.task_bytes / (plan.bandwidth * 1e9)


def methods(one: One, plan: Plan) -> list[Method]:
    """Ours first, then dense copies, a LoRA, and each peer at its reported ratio."""
    base, dense = one.base_bytes, one.dense_bytes
    lora = f"LoRA of rank {plan.lora_rank}"
    return [
        Method(OURS, one.file_bytes, base, one.changed_bytes, one.load, one.switch),
        Method(DENSE, dense, 0, 0, one.plain_load, one.plain_load),
        Method(lora, LORA_BYTES * one.lora_params, base, 0),
        *(
            Method(
                peer.name,
                dense / peer.ratio,
                base,
                0 if peer.unrebuilt else dense,
                None,
                None,
                True,
            )
            for peer in PEERS
        ),
    ]


def project(one: One, plan: Plan) -> list[Figure]:
    """Every method's totals; all are projections."""
    found: list[Figure] = []
    dense = one.dense_bytes
    for method in methods(one, plan):
        transfer = method.transfer(plan)
        cold = None if method.start is None else transfer + method.start
        warm = None if method.warm_start is None else transfer + method.warm_start
        egress = method.egress(plan)
        found += row(
            method.name,
            "projected",
            [
                ("one task", method.task_bytes, "bytes"),
                ("disk", method.disk(plan.tasks), "bytes"),
                ("dense / this", plan.tasks * dense / method.disk(plan.tasks), "ratio"),
                ("egress", egress, "bytes"),
                ("egress cost", egress / 1e9 * plan.egress_price, "USD"),
                ("memory, one in use", method.at_hand(plan.resident), "bytes"),
                ("memory, all in use", method.at_once(plan.resident, dense), "bytes"),
                ("download", transfer, "seconds"),
                ("cold start", cold, "seconds"),
                ("warm start", warm, "seconds"),
            ],
        )
    return found
