"""`python -m consumer`: watches the log topic and publishes alerts until it is told to stop."""

import logging
import signal
from argparse import Namespace

import torch

from consumer.artifacts import Artifacts
from consumer.logs import FORMATS, changed, set_up
from consumer.patience import Patience
from consumer.rekey import Rekeyer
from consumer.service import Service
from consumer.settings import Settings, load_settings
from consumer.topics import (
    READ,
    WRITE,
    TopicSpec,
    check_rights,
    check_state_topic,
    ensure_topics,
    require_topic,
    warn_of_senders_clocks,
)
from model.cli import argument_parser, run
from model.device import choose
from model.errors import UserError

log = logging.getLogger("consumer")


def main() -> int:
    """Do as the command line says; with JSON logs the last word is JSON, too."""
    parser = argument_parser("consumer", "Watch the log topic and publish anomaly alerts.")
    parser.add_argument(
        "--rekey",
        action="store_true",
        help="instead, turn the raw lines of topics.lines into events on topics.events, keyed by block",
    )
    parser.add_argument("--log-format", choices=FORMATS, default="text", help="lines for people, or a JSON object each")
    arguments = parser.parse_args()
    set_up(arguments.log_format)
    try:
        return _watch(arguments)
    except UserError as error:
        if arguments.log_format == "text":
            raise
        log.critical("%s", error)
        return 2


def _watch(arguments: Namespace) -> int:
    """Start, say what with, run until SIGTERM or Ctrl-C, say what was done."""
    settings = load_settings(arguments.config)
    patience = Patience()
    patience.end_on(signal.SIGTERM, signal.SIGINT)
    if arguments.rekey:
        return _rekey(settings, patience)

    torch.set_num_threads(1)  # its threads wait for each other by spinning, at the cost of Kafka's
    artifacts = Artifacts.load(settings)
    device = choose(settings.device)
    topics = settings.topics
    first = map(TopicSpec, (topics.events, topics.alerts, topics.dead_letters))
    created = ensure_topics(settings, first, then=[topics.state])
    as_many = require_topic(settings, topics.events)
    created += ensure_topics(settings, [TopicSpec(topics.state, as_many)])
    for name in created:
        log.info("created topic %s", name)
    check_state_topic(settings)
    written = {topics.alerts: {WRITE}, topics.dead_letters: {WRITE}, topics.state: {READ, WRITE}}
    check_rights(settings, {topics.events: {READ}} | written)
    warn_of_senders_clocks(settings, topics.events)
    service = Service(settings, artifacts, patience)
    log.info("settings   %s; not the defaults: %s", arguments.config, changed(settings))
    _introduce(settings, artifacts, as_many, device)
    service.run()
    log.info("stopped: %s", service.summary())
    return patience.exit_status()


def _introduce(settings: Settings, artifacts: Artifacts, partitions: int, device: torch.device) -> None:
    topics, bundle, threshold = settings.topics, artifacts.bundle, artifacts.threshold
    weights = sum(weight.numel() for weight in bundle.network.parameters())
    graver = "".join(f", {level.name} above {level.threshold:g}" for level in threshold.levels[1:])
    for what, text in (
        ("reading", f"{topics.events}, {partitions} partitions, as group {settings.kafka.group}"),
        ("brokers", settings.kafka.bootstrap),
        ("writing", f"alerts to {topics.alerts}, undecodable messages to {topics.dead_letters}"),
        ("delivery", f"{settings.delivery}, windows of open blocks on {topics.state}"),
        ("model", f"{bundle.fingerprint[:12]}, {weights:,} weights on {device}, windows of {bundle.window} events"),
        ("threshold", f"{threshold.threshold:g} nats ({threshold.strategy}){graver}"),
        ("promise", f"at most {threshold.bound:.2g} of normal blocks alert (q = {threshold.quantile:g})"),
    ):
        log.info("%-10s %s", what, text)


def _rekey(settings: Settings, patience: Patience) -> int:
    topics = settings.topics
    if settings.events.format == "text":
        raise UserError(
            f"events.format: text makes the detector take {topics.events} for raw lines, but --rekey writes events "
            "there; set it to json"
        )
    rekeyer = Rekeyer(settings, patience)
    for name in ensure_topics(settings, map(TopicSpec, (topics.lines, topics.events, topics.dead_letters))):
        log.info("created topic %s", name)
    check_rights(settings, {topics.lines: {READ}, topics.events: {WRITE}, topics.dead_letters: {WRITE}})
    warn_of_senders_clocks(settings, topics.events)
    log.info("reading %s as group %s from %s", topics.lines, rekeyer.group, settings.kafka.bootstrap)
    log.info("events go to %s keyed by block, delivery %s", topics.events, settings.delivery)
    rekeyer.run()
    log.info("stopped: %s", rekeyer.status())
    return patience.exit_status()


if __name__ == "__main__":
    run(main)
