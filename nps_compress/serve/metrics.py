"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nps_compress.bank import BankMetrics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters of one server, in a registry of its own. ``task`` is a task's or the base's name."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "nps_requests",
            "Answers to requests that name a task.",
            ["task", "status"],
            registry=registry,
        )
        self.refused = Counter(
            "nps_refused",
            "Requests refused before they named a task.",
            ["status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "nps_request_seconds",
            "From a request to the end of its answer.",
            ["task"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.prompt_tokens = Counter(
            "nps_prompt_tokens", "Tokens read.", ["task"], registry=registry
        )
        self.generated_tokens = Counter(
            "nps_generated_tokens", "Tokens written.", ["task"], registry=registry
        )
        self.batch_rows = Histogram(
            "nps_batch_rows",
            "Rows of a pass through the model.",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self.batch_tasks = Histogram(
            "nps_batch_tasks",
            "Tasks of a pass through the model, the base being one.",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )
        self.waiting = Gauge("nps_waiting", "Items that wait.", registry=registry)
        self.running = Gauge("nps_running", "Items that run.", registry=registry)

    def watch(self, bank: Callable[[], BankMetrics]) -> None:
        """Tell what a bank says of itself, whenever it is asked for."""
        self.registry.register(_BankCollector(bank))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _BankCollector:
    def __init__(self, bank: Callable[[], BankMetrics]) -> None:
        self._bank = bank

    def collect(self) -> Iterable[Metric]:
        found = self._bank()
        counts = (
            ("switches", "Switches to another task or the base."),
            ("hits", "Times that a task was in the fastest memory."),
            ("misses", "Times that it was not."),
            ("loads", "Tasks read from disk."),
            ("evictions", "Tasks that left a memory."),
            ("failures", "Switches that failed."),
        )
        for name, what in counts:
            yield CounterMetricFamily(f"nps_bank_{name}", what, value=getattr(found, name))
        sizes = GaugeMetricFamily("nps_bank_bytes", "Bytes of tasks.", labels=["tier"])
        for tier, nbytes in found.nbytes.items():
            sizes.add_metric([tier], nbytes)
        yield sizes
        yield GaugeMetricFamily(
            "nps_bank_undo_bytes", "Buffers of a switch.", value=found.undo_bytes
        )
        if found.switch_seconds:
            yield GaugeMetricFamily(
                "nps_bank_last_switch_seconds", "The last switch.", value=found.switch_seconds[-1]
            )
