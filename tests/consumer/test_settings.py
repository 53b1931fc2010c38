from pathlib import Path

import pytest

from consumer.settings import Settings, load_settings
from model.errors import UserError

CONFIG = Path(__file__).parents[2] / "config.yaml"


def test_the_shipped_file_states_the_defaults():
    assert load_settings(CONFIG) == Settings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("windows: {z: 1}", "windows.z is not a known setting"),
        ("windows: {idle_timeout: 3x}", "windows.idle_timeout: should be a duration"),
        ("scoring: {every: many}", "scoring.every: input should be a valid integer"),
        ("model: {width: 10, heads: 3}", "model: width (10) should be a multiple of heads (3)"),
        ("kafka: {enable.auto.commit: true}", "kafka: enable.auto.commit cannot be set"),
        ("topics: {alerts: log-events}", "topics: lines, events, alerts, dead_letters and state should be five"),
        (
            "kafka: {sasl.password: '${NO_SUCH_VARIABLE}'}",
            "kafka.sasl.password needs the environment variable",
        ),
        ("calibration: {levels: {minor: 0.99}}", "calibration: minor is the level of calibration.quantile"),
        ("calibration: {levels: {a: 0.99, b: 0.99}}", "calibration: two levels have the same quantile"),
        ("calibration: {levels: {a: 1.5}}", "calibration.levels.a: input should be less than 1"),
        ("calibration: {levels: {'a b': 0.99}}", "calibration.levels.a b"),
        ("events: {block_pattern: 'blk_('}", "events.block_pattern: is not a regular expression: missing )"),
        (
            "commit: {interval: 6s}",
            "commit.interval is 6,000 ms, but a transaction is over after 10,000: make it half of that at most",
        ),
        ("events: {block_pattern: '(a)(b)'}", "events.block_pattern: should have at most one group"),
        ("events: {block_pattern: '[0-9]*'}", "events: block_pattern should not match where there is nothing"),
        ("events: {timestamp_format: '%b %d %H:%M:%S'}", "events: timestamp_format should name the year"),
        (
            "events: {timestamp_format: '%Y-%m-%d %K:%M:%S'}",
            "events: timestamp_format would give no line a time: 'K' is a bad directive; the directives are those of",
        ),
        ("events: {timestamp_format: '%Y %'}", "timestamp_format would give no line a time: stray %; the"),
        ("events: {timestamp_format: '%Y %Y'}", "timestamp_format would give no line a time: redefinition of group"),
        ("events: {masks: {user: a}}", "events.masks.user"),
        ("events: {masks: {A: '['}}", "events.masks.A: is not a regular expression"),
        ("events: {masks: {A: 'x{2,}[0-9a-f]{8}'}}", "events.masks.A: asks for certain digits"),
        ("events: {message_pattern: '127.0.0.1'}", "events.message_pattern: asks for certain digits"),
        ("events: {format: xml}", "events.format: input should be 'json' or 'text'"),
        ("a: [", "not valid YAML"),
        ("a: &a [*a]", "a value holds itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "lists are nested too deeply"),
        ('model: {path: "a\\0b"}', "model.path holds a NUL byte"),
        (
            "windows: {idle_timeout: 1h}\ndrift: {}\nwindows: {max_ahead: 1h}",
            "config.yaml, line 3: windows is set here and in line 1 already",
        ),
        ("windows:\n  max_ahead: 1h\n  'max_ahead': 2h", "line 3: max_ahead is set here and in line 2 already"),
        ("kafka:\n  client.id: 2020-13-45", "config.yaml, line 2: a value here looks like a date or a number"),
        ("scoring: {every: 0x_}", "config.yaml, line 1: a value here looks like a date or a number"),
        ("- 1", "must be a mapping"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_place(tmp_path, text, said):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_group_may_be_named_for_every_client_or_for_consumers():
    def group(**kafka):
        return Settings.model_validate({"kafka": kafka}).kafka.group

    assert group(**{"group.id": "mine"}) == "mine"
    assert group(**{"group.id": "mine", "consumer": {"group.id": "other"}}) == "other"
    assert group() == "log-anomaly-transformer"


@pytest.mark.parametrize(
    "form",
    [
        "%y%m%d %H%M%S", "%Y-%m-%d", "%d/%b/%Y:%H:%M:%S %z", "%Y-%m-%dT%H:%M:%S.%fZ", "%a %b %d %H:%M:%S %Z %Y", "%c",
        "%x %X", "%B %d, %Y %I:%M:%S %p", "%Y/%j %H%M%S%f", "%G-W%V-%u", "%Y %U %w", "100%% %Y", "[%Y年%m月%d日]",
        "iso", "ms", "s",
    ],
)  # fmt: skip
def test_a_format_that_strptime_reads_is_taken(tmp_path, form):
    path = tmp_path / "config.yaml"
    path.write_text(f"events: {{timestamp_format: '{form}'}}", encoding="utf-8")
    assert load_settings(path).events.timestamp_format == form


def test_a_section_may_take_over_another_and_change_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "kafka:\n  consumer: &common {client.id: a, fetch.min.bytes: 2}\n  producer: {<<: *common, client.id: b}\n"
    )
    settings = load_settings(path).kafka
    assert settings.consumer["client.id"] == "a"
    assert settings.producer["client.id"] == "b"
    assert settings.producer["fetch.min.bytes"] == 2


def test_secrets_come_from_the_environment_and_are_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("KAFKA_PASSWORD", "hunter2")
    path = tmp_path / "config.yaml"
    path.write_text("kafka: {sasl.password: '${KAFKA_PASSWORD}'}")
    settings = load_settings(path)
    assert settings.kafka.for_consumer()["sasl.password"] == "hunter2"
    assert "hunter2" not in repr(settings)
    path.write_text("topics: {events: '${EVENTS:-logs}', alerts: '${KAFKA_PASSWORD:-alerts}'}")
    assert (load_settings(path).topics.events, load_settings(path).topics.alerts) == ("logs", "hunter2")
    path.write_text("kafka: {sasl.password: ['${KAFKA_PASSWORD}']}")
    with pytest.raises(UserError) as caught:
        load_settings(path)
    assert "hunter2" not in str(caught.value)
