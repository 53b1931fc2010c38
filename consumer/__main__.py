"""`python -m consumer`: watches the log topic and publishes alerts until it is told to stop."""

import logging
import signal

from consumer.artifacts import Artifacts
from consumer.patience import Patience
from consumer.rekey import Rekeyer
from consumer.service import Service
from consumer.settings import Settings, load_settings
from consumer.topics import STATE_CONFIG, TopicSpec, check_state_topic, ensure_topics, require_topic
from model.bundle import Bundle
from model.cli import argument_parser, run
from model.device import choose
from model.errors import UserError

log = logging.getLogger("consumer")


def main() -> int:
    """Start, say what with, run until SIGTERM or Ctrl-C, say what was done."""
    parser = argument_parser("consumer", "Watch the log topic and publish anomaly alerts.")
    parser.add_argument(
        "--rekey",
        action="store_true",
        help="instead, turn the raw lines of topics.lines into events on topics.events, keyed by block",
    )
    arguments = parser.parse_args()
    settings = load_settings(arguments.config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s")
    patience = Patience()
    patience.end_on(signal.SIGTERM, signal.SIGINT)
    if arguments.rekey:
        return _rekey(settings, patience)

    artifacts = Artifacts.load(settings)
    device = choose(settings.device)
    topics = settings.topics
    created = ensure_topics(settings, map(TopicSpec, (topics.events, topics.alerts, topics.dead_letters)))
    as_many = require_topic(settings, topics.events)
    created += ensure_topics(settings, [TopicSpec(topics.state, as_many, STATE_CONFIG)])
    for name in created:
        log.info("created topic %s", name)
    check_state_topic(settings)
    service = Service(settings, artifacts, patience)
    log.info("reading %s as group %s from %s", topics.events, settings.kafka.group, settings.kafka.bootstrap)
    log.info(
        "alerts go to %s, undecodable messages to %s, delivery %s",
        topics.alerts,
        topics.dead_letters,
        settings.delivery,
    )
    log.info("on %s: %s", device, artifacts)
    service.run()
    log.info("stopped: %s", service.summary())
    return patience.exit_status()


def _rekey(settings: Settings, patience: Patience) -> int:
    topics = settings.topics
    if settings.events.format == "text":
        raise UserError(
            f"events.format: text makes the detector take {topics.events} for raw lines, but --rekey writes events "
            "there; set it to json"
        )
    rekeyer = Rekeyer(settings, Bundle.load(settings.model.path), patience)
    for name in ensure_topics(settings, map(TopicSpec, (topics.lines, topics.events, topics.dead_letters))):
        log.info("created topic %s", name)
    log.info("reading %s as group %s from %s", topics.lines, rekeyer.group, settings.kafka.bootstrap)
    log.info("events go to %s keyed by block, delivery %s", topics.events, settings.delivery)
    rekeyer.run()
    log.info("stopped: %s", rekeyer.summary())
    return patience.exit_status()


if __name__ == "__main__":
    run(main)
