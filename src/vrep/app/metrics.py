"""Prometheus: the status of a site as metrics, collected when they are asked for.

Names, labels and types are API: `METRICS` is the whole list, the reference is generated from it.
Nothing is counted on a guest's path; a scrape asks the site's processes what `vrep status` asks.
A figure whose process does not answer has no sample.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vrep import errors
from vrep.settings import StatusConfig
from vrep.status import STATES, collect, verdict
from vrep.wire.address import parse_address

if TYPE_CHECKING:
    from vrep.site import Site

RETRY_S: Final = 10.0

log = structlog.get_logger("vrep.metrics")


@dataclass(frozen=True)
class Definition:
    """One metric as it is documented."""

    name: str
    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    help: str


_GROUP: Final = ("group",)
_TARGET: Final = ("group", "target")

METRICS: Final = (
    Definition("vrep_up", "gauge", ("site",), "1 when the status could be collected"),
    Definition("vrep_role_up", "gauge", ("role",), "1 while a role's process answers"),
    Definition("vrep_verdict", "gauge", (), "what status --check says: 0, 1 warning, 2 critical"),
    Definition("vrep_group_state", "gauge", ("group", "role", "state"), "1 for the present state"),
    Definition("vrep_group_condition", "gauge", ("group", "condition"), "1 while it holds"),
    Definition("vrep_group_epoch", "gauge", _GROUP, "the epoch that writes"),
    Definition("vrep_group_clients", "gauge", _GROUP, "NBD connections"),
    Definition("vrep_group_size_bytes", "gauge", ("group", "disk"), "size of a protected disk"),
    Definition(
        "vrep_group_transitions_total",
        "counter",
        ("group", "state"),
        "how often it came into a state since the source's process began",
    ),
    Definition("vrep_lane_cuts_total", "counter", _GROUP, "cuts that a lane held for to the end"),
    Definition(
        "vrep_lane_cuts_void_total", "counter", _GROUP, "holds that ended by themselves: void cuts"
    ),
    Definition("vrep_lane_hold_max_seconds", "gauge", _GROUP, "longest wait of answers for a cut"),
    Definition("vrep_target_connected", "gauge", _TARGET, "1 while the session stands"),
    Definition(
        "vrep_target_rpo_seconds", "gauge", _TARGET, "age of the oldest write not durable there"
    ),
    Definition("vrep_target_lag_bytes", "gauge", _TARGET, "recorded and not durable there"),
    Definition("vrep_target_spill_bytes", "gauge", _TARGET, "of that, on the source's disk"),
    Definition(
        "vrep_target_missing_bytes", "gauge", _TARGET, "what it lacks until replication is whole"
    ),
    Definition(
        "vrep_target_whole_seconds", "gauge", _TARGET, "estimate of when that is; none: not known"
    ),
    Definition("vrep_target_dirty_bytes", "gauge", _TARGET, "blocks it may not hold durably"),
    Definition("vrep_target_unshipped_bytes", "gauge", _TARGET, "blocks that a sync must copy"),
    Definition("vrep_target_seq", "gauge", _TARGET, "newest record of the group"),
    Definition("vrep_target_durable_seq", "gauge", _TARGET, "newest record durable there"),
    Definition("vrep_target_round_trip_seconds", "gauge", _TARGET, "of the connection"),
    Definition("vrep_target_sent_bytes_total", "counter", _TARGET, "sealed bytes since the start"),
    Definition("vrep_target_sent_records_total", "counter", _TARGET, "records since the start"),
    Definition("vrep_target_compared_bytes", "gauge", _TARGET, "compared since the resync began"),
    Definition("vrep_target_equal_bytes", "gauge", _TARGET, "of that, equal there: not sent"),
    Definition(
        "vrep_target_hash_bytes_total", "counter", _TARGET, "hashes and questions since the start"
    ),
    Definition("vrep_store_bytes", "gauge", _GROUP, "bytes of history held here"),
    Definition("vrep_store_durable_seq", "gauge", _GROUP, "newest record durable here"),
    Definition("vrep_store_segments", "gauge", _GROUP, "segments of history held here"),
    Definition("vrep_store_quota_bytes", "gauge", _GROUP, "that the history may use; 0: no limit"),
    Definition("vrep_store_window_seconds", "gauge", _GROUP, "age of the oldest recovery point"),
    Definition("vrep_store_folded_bytes_total", "counter", _GROUP, "written by folds"),
    Definition(
        "vrep_store_write_amplification", "gauge", _GROUP, "bytes written for each one received"
    ),
    Definition("vrep_store_dead_ratio", "gauge", _GROUP, "of what was folded, what no point needs"),
    Definition("vrep_store_stale_bytes", "gauge", _GROUP, "replaced files that readers hold"),
)

Sample = tuple[str, tuple[str, ...], float]


def samples(
    site_name: str, status: Mapping[str, Any], limits: StatusConfig | None = None
) -> Iterator[Sample]:
    """Every value of a status as (metric, label values, value)."""
    yield "vrep_up", (site_name,), 1
    for role, runs in status["roles"].items():
        yield "vrep_role_up", (role,), float(runs)
    yield "vrep_verdict", (), verdict(status, limits)[0]
    for name, group in status["groups"].items():
        for state in STATES:
            yield "vrep_group_state", (name, group["role"], state), float(group["state"] == state)
        for condition in group["conditions"]:
            yield "vrep_group_condition", (name, condition), 1
        if "epoch" in group:
            yield "vrep_group_epoch", (name,), float(group["epoch"])
        yield from _protected(name, group) if group["role"] == "source" else _stored(name, group)


def _known(
    source: Mapping[str, Any], labels: tuple[str, ...], keys: Iterable[tuple[str, str, float]]
) -> Iterator[Sample]:
    """Samples of (metric, key, values a unit): what nobody knows has none, since 0 would say that
    all is well."""
    for metric, key, unit in keys:
        value = source.get(key)
        if value is not None:
            yield metric, labels, value / unit


def _protected(name: str, group: Mapping[str, Any]) -> Iterator[Sample]:
    yield from _known(group, (name,), (("vrep_group_clients", "clients", 1),))
    for state, count in ((group.get("transitions") or {}).get("counts") or {}).items():
        yield "vrep_group_transitions_total", (name, state), float(count)
    lane = group.get("filter") if group.get("cuts") else None
    if lane:
        yield "vrep_lane_cuts_total", (name,), float(lane["cuts"])
        yield "vrep_lane_cuts_void_total", (name,), float(lane["cuts_void"])
        yield "vrep_lane_hold_max_seconds", (name,), lane["cut_hold_ns_max"] / 1e9
    for disk in group["disks"]:
        yield "vrep_group_size_bytes", (name, disk["name"]), float(disk["size"])
    for target in group["targets"]:
        labels = (name, str(target["site"]))
        yield "vrep_target_connected", labels, float(target["connected"])
        yield from _known(
            target,
            labels,
            (
                ("vrep_target_rpo_seconds", "rpo_ms", 1000),
                ("vrep_target_lag_bytes", "lag_bytes", 1),
                ("vrep_target_spill_bytes", "spill_bytes", 1),
                ("vrep_target_missing_bytes", "missing_bytes", 1),
                ("vrep_target_whole_seconds", "whole_in_s", 1),
                ("vrep_target_dirty_bytes", "dirty_bytes", 1),
                ("vrep_target_unshipped_bytes", "unshipped_bytes", 1),
                ("vrep_target_seq", "seq", 1),
                ("vrep_target_durable_seq", "durable_seq", 1),
                ("vrep_target_round_trip_seconds", "round_trip_ms", 1000),
                ("vrep_target_sent_bytes_total", "bytes_sent", 1),
                ("vrep_target_sent_records_total", "records_sent", 1),
                ("vrep_target_compared_bytes", "compared_bytes", 1),
                ("vrep_target_equal_bytes", "equal_bytes", 1),
                ("vrep_target_hash_bytes_total", "hash_bytes", 1),
            ),
        )


def _stored(name: str, group: Mapping[str, Any]) -> Iterator[Sample]:
    yield from _known(  # a store that could not be opened has none of them
        group,
        (name,),
        (
            ("vrep_store_bytes", "bytes", 1),
            ("vrep_store_durable_seq", "durable_seq", 1),
            ("vrep_store_segments", "segments", 1),
            ("vrep_store_quota_bytes", "quota_bytes", 1),
            ("vrep_store_window_seconds", "real_window_s", 1),
            ("vrep_store_folded_bytes_total", "folded_bytes", 1),
            ("vrep_store_write_amplification", "write_amplification", 1),
            ("vrep_store_dead_ratio", "dead_share", 1),
            ("vrep_store_stale_bytes", "stale_bytes", 1),
        ),
    )


class SiteCollector(Collector):
    """Asks a site for its status at every scrape."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._limits = site.config.status

    def collect(self) -> Iterable[Metric]:
        name = self._site.identity.name
        try:
            found = list(samples(name, collect(self._site), self._limits))
        except errors.VrepError:
            found = [("vrep_up", (name,), 0)]
        families = {definition.name: _family(definition) for definition in METRICS}
        for metric, labels, value in found:
            families[metric].add_metric(labels, value)
        return [family for family in families.values() if family.samples]

    def describe(self) -> Iterable[Metric]:
        return [_family(definition) for definition in METRICS]


def _family(definition: Definition) -> GaugeMetricFamily | CounterMetricFamily:
    kind = GaugeMetricFamily if definition.kind == "gauge" else CounterMetricFamily
    return kind(definition.name, definition.help, labels=definition.labels)


class MetricsServer:
    """Serves /metrics on HOST:PORT, on a thread of its own, until closed."""

    def __init__(self, site: Site, listen: str) -> None:
        host, port = parse_address(listen)
        registry = CollectorRegistry()
        registry.register(SiteCollector(site))
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise errors.ConfigError(
                f"metrics.listen {listen}: {error.strerror or error}"
            ) from None
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def serve_when_free(site: Site, listen: str, stopping: threading.Event) -> None:
    """Serve until stopped, once the address is free: another process of the site may have it."""
    told = ""
    while not stopping.is_set():
        try:
            with MetricsServer(site, listen):
                stopping.wait()
        except errors.VrepError as error:
            if told != str(error):
                told = str(error)
                log.info("metrics are not served by this process", reason=told)
            stopping.wait(RETRY_S)


__all__ = ["METRICS", "Definition", "MetricsServer", "SiteCollector", "samples", "serve_when_free"]
