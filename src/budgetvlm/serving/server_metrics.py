"""What Prometheus is told: times in seconds, counts that end in _total, and nothing of what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from budgetvlm._version import __version__
from budgetvlm.serving.jobs import setting_text

if TYPE_CHECKING:
    from budgetvlm.serving.background_update import Updates
    from budgetvlm.serving.dispatcher import Dispatcher
    from budgetvlm.serving.gate import Gate

SECONDS = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
PATHS = {
    "/v1/chat/completions", "/v1/models", "/v1/feedback", "/health", "/ready", "/metrics", "/admin/reload",
    "/playground/preview",
}  # fmt: skip
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class ServerMetrics:
    """Counts what comes of requests, and reads the queue when it is asked.

    Args:
        model: the served model's name.
    """

    def __init__(self, model: str, jobs: Dispatcher, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        for name, text, *labels in (
            ("http_requests", "Requests by what became of them.", "method", "path", "status"),
            ("refusals", "Requests that got no answer, by the code of their error.", "reason"),
            ("clients_left", "Clients that left before their answer was complete."),
            ("answers", "Answers by how they ended.", "finish_reason"),
            ("budgets", "Answers by what became of their budget: met, missed, or none given.", "result"),
            (
                "promises",
                "Answers with a budget by whether a setting was sure to keep it.",
                "feasible",
            ),
            ("settings", "Answers by the setting that was chosen.", "setting"),
            ("tokens", "Tokens read and written.", "kind"),
        ):
            self._counters[name] = Counter(f"budgetvlm_{name}", text, labels, registry=self.registry)
        self._stages = self._times("stage_duration_seconds", "Time of each stage.", "stage")
        self._latency = self._times("request_duration_seconds", "Time from a request's arrival to its last token.")
        build = Gauge("budgetvlm_build_info", "What is served.", ["version", "model"], registry=self.registry)
        build.labels(__version__, model).set(1)
        self.registry.register(_State(jobs, gate))
        ProcessCollector(registry=self.registry)

    def _times(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"budgetvlm_{name}", text, labels, buckets=SECONDS, registry=self.registry)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)

    def requested(self, method: str, path: str, status: int, error: str | None) -> None:
        """Count a request; unknown methods and paths share one name, so that nobody can make up new ones."""
        labels = method if method in METHODS else "other", path if path in PATHS else "other", str(status)
        self._counters["http_requests"].labels(*labels).inc()
        if error:
            self._counters["refusals"].labels(error).inc()

    def left(self) -> None:
        """Count a client that left."""
        self._counters["clients_left"].inc()

    def answered(self, outcome: dict[str, Any]) -> None:
        """Count an answer.

        Args:
            outcome: the field "budgetvlm" of the answer.
        """
        counters, limited = self._counters, outcome["budget_ms"] is not None
        counters["answers"].labels(outcome["finish_reason"]).inc()
        counters["budgets"].labels(("met" if outcome["budget_met"] else "missed") if limited else "none").inc()
        if limited:
            counters["promises"].labels(str(outcome["feasible"]).lower()).inc()
        counters["settings"].labels(setting_text(outcome["setting"])).inc()
        for kind in ("vision", "language", "output"):
            counters["tokens"].labels(kind).inc(outcome[f"num_{kind}_tokens"])
        self._latency.observe(outcome["latency_ms"] / 1e3)
        for stage, took_ms in {"queue": outcome["queue_ms"], **outcome["stages_ms"]}.items():
            self._stages.labels(stage).observe(took_ms / 1e3)


class _State(Collector):
    """What is read when it is asked for."""

    def __init__(self, jobs: Dispatcher, gate: Gate) -> None:
        self._jobs, self._gate = jobs, gate

    def collect(self) -> Iterator[Metric]:
        jobs = self._jobs
        for name, text, value in (
            ("queue_length", "Requests that wait for a replica.", jobs.waiting),
            ("requests_open", "Requests that are read, wait or are answered.", self._gate.open),
            ("price", "Accuracy that one latency of the full setting has to buy now.", jobs.price),
            ("replicas", "Replicas that could take a request.", sum(one.up for one in jobs.replicas)),
            ("capacity", "Requests that could be answered at once.", jobs.capacity),
        ):
            yield GaugeMetricFamily(f"budgetvlm_{name}", text, value)
        up = GaugeMetricFamily("budgetvlm_replica_up", "Whether a replica answers.", labels=["replica"])
        in_flight = GaugeMetricFamily("budgetvlm_replica_requests", "Requests at a replica.", labels=["replica"])
        failed = CounterMetricFamily("budgetvlm_replica_failures", "Failures of a replica.", labels=["replica"])
        for one in jobs.replicas:
            for metric, value in ((up, one.up), (in_flight, one.in_flight), (failed, one.failures)):
                metric.add_metric([one.name], value)
        yield from (up, in_flight, failed)
        yield CounterMetricFamily("budgetvlm_replica_restarts", "Replicas that died and were replaced.", jobs.restarts)
        text, left_out = "Served requests that were to be kept and were not.", jobs.store.dropped if jobs.store else 0
        yield CounterMetricFamily("budgetvlm_requests_not_kept", text, left_out)
        for name, which in (("controller_version", "serving"), ("candidate_version", "candidate")):
            text = f"Version of the controller that is {which}; 0: none is kept."
            yield GaugeMetricFamily(f"budgetvlm_{name}", text, value=jobs.versions.get(which) or 0)
        if jobs.updates:
            yield from _of_updates(jobs.updates)
        yield CounterMetricFamily("budgetvlm_reloads", "Times that the controller was read anew.", jobs.reloads)


def _of_updates(updates: Updates) -> Iterator[Metric]:
    done = CounterMetricFamily("budgetvlm_updates", "Updates of the controller by what they did.", labels=["action"])
    for action, times in updates.results.items():
        done.add_metric([action], times)
    text = "Whether requests or scores are no longer those that the controller was made for."
    drift = GaugeMetricFamily("budgetvlm_drift", text, labels=["of"])
    for name in ("features", "accuracy"):
        drift.add_metric([name], float(bool(updates.drift.get(name))))
    yield from (done, drift)
