"""SASL_SSL and ACLs on a real broker: what docs/security.md says works, and each mistake is one sentence."""

import argparse
import datetime as dt
import ipaddress
import json
import re
import shlex
from pathlib import Path

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from scripts.local_kafka import QUICK_ABORTS, LocalKafka, free_port
from scripts.simulator import simulate

PAGE = Path(__file__).parents[2] / "docs" / "security.md"

SECRET = "correct-horse-battery"  # noqa: S105 - of a broker that lives for these tests
WRONG = "incorrect-donkey-staple"
USER = "detector"


def certificate(name, issuer=None):
    """Return a key and a certificate for 127.0.0.1, signed by the issuer's key or its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    authority_key, authority = issuer or (key, None)
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return key, made


def pem(key, made):
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + made.public_bytes(serialization.Encoding.PEM)


class Secured:
    """A broker with a plaintext listener for the administrator, whom it lets do everything, and one with SASL_SSL."""

    def __init__(self, folder):
        authority = certificate("authority")
        (folder / "authority.pem").write_bytes(authority[1].public_bytes(serialization.Encoding.PEM))
        (folder / "other.pem").write_bytes(certificate("other")[1].public_bytes(serialization.Encoding.PEM))
        (folder / "broker.pem").write_bytes(pem(*certificate("broker", authority)))
        self.folder = folder
        port = free_port()
        self.bootstrap = f"127.0.0.1:{port}"
        plain = "org.apache.kafka.common.security.plain.PlainLoginModule"
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule"
        self.broker = LocalKafka(
            folder / "kafka",
            free_port(),
            properties=QUICK_ABORTS
            | {
                "listeners": f"SECURED://127.0.0.1:{port}",
                "listener.security.protocol.map": "SECURED:SASL_SSL",
                "listener.name.secured.sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
                "listener.name.secured.scram-sha-512.sasl.jaas.config": f"{scram} required;",
                "listener.name.secured.plain.sasl.jaas.config": f'{plain} required user_{USER}="{SECRET}";',
                "listener.name.secured.ssl.keystore.type": "PEM",
                "listener.name.secured.ssl.keystore.location": str(folder / "broker.pem"),
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:ANONYMOUS",
            },
        )
        self.broker.up()
        self.admin = AdminClient({"bootstrap.servers": self.broker.bootstrap})
        iterations = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(USER, iterations, SECRET.encode())
        self.admin.alter_user_scram_credentials([change])[USER].result(10)

    def settings(self, **changes):
        """Return the settings under `kafka` of docs/security.md, for this broker."""
        return {
            "bootstrap.servers": self.bootstrap,
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": USER,
            "sasl.password": "${KAFKA_PASSWORD}",
            "ssl.ca.location": str(self.folder / "authority.pem"),
        } | changes

    def prepare(self, made, without=None, process="consumer"):
        """Create a line's topics and give the rights that the page names for a process, but one."""
        topics = made.settings.topics
        names = (topics.lines, topics.events, topics.alerts, topics.dead_letters, topics.state)
        for future in self.admin.create_topics(
            [
                NewTopic(name, 3, 1, config={"cleanup.policy": "compact" if "state" in name else "delete"})
                for name in names
            ]
        ).values():
            future.result(10)
        bindings = [binding for what, binding in documented(made, process) if what != without]
        assert len(bindings) == {"consumer": 8, "rekey": 5}[process] - (without is not None)
        for future in self.admin.create_acls(bindings).values():
            future.result(10)


def documented(made, process):
    """Yield what each kafka-acls.sh command of the page gives a process's user: (operation, on what), and the ACL."""
    names = {
        "log-lines": made.settings.topics.lines,
        "log-events": made.settings.topics.events,
        "log-anomaly-alerts": made.settings.topics.alerts,
        "log-anomaly-dead-letters": made.settings.topics.dead_letters,
        "log-anomaly-state": made.settings.topics.state,
        "log-anomaly-transformer": made.name,
        "log-anomaly-transformer-rekey": f"{made.name}-rekey",
        "log-anomaly-transformer-": f"{made.name}-",
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("--operation", action="append")
    parser.add_argument("--resource-pattern-type", default="literal")
    for kind in (ResourceType.TOPIC, ResourceType.GROUP, ResourceType.TRANSACTIONAL_ID):
        parser.add_argument(f"--{kind.name.lower().replace('_', '-')}", dest=kind.name)
    blocks = [block for block in PAGE.read_text().split("```") if "\n$acls " in block]
    (block,) = (block for block in blocks if ("-rekey" in block) == (process == "rekey"))
    for command in re.findall(r"^\$acls (.*)$", block, re.MULTILINE):
        given = vars(parser.parse_args(shlex.split(command)))
        pattern = ResourcePatternType[given.pop("resource_pattern_type").upper()]
        operations = given.pop("operation")
        ((kind, name),) = ((kind, name) for kind, name in given.items() if name)
        for operation in operations:
            right = AclOperation[re.sub(r"(?<!^)(?=[A-Z])", "_", operation).upper()]
            yield (
                (operation, name),
                AclBinding(
                    ResourceType[kind], names[name], pattern, f"User:{USER}", "*", right, AclPermissionType.ALLOW
                ),
            )


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    broker = Secured(tmp_path_factory.mktemp("secured"))
    yield broker
    broker.broker.down(purge=True)


@pytest.fixture
def secured_line(secured, line, monkeypatch):
    """Make lines whose consumers use the secured listener, and whose tests use the plain one."""
    monkeypatch.setenv("KAFKA_PASSWORD", SECRET)

    def make(without=None, delivery="exactly_once", process="consumer", changes=None, **kafka):
        made = line(broker=secured.broker, kafka=secured.settings(**kafka), delivery=delivery, **(changes or {}))
        secured.prepare(made, without, process)
        return made

    return make


@pytest.mark.parametrize(
    ("mechanism", "delivery", "without"),
    [
        ("SCRAM-SHA-512", "exactly_once", None),
        ("PLAIN", "at_least_once", ("Write", "log-anomaly-transformer-")),
    ],
)
def test_with_the_documented_rights_alerts_are_published(secured_line, mechanism, delivery, without):
    made = secured_line(without, delivery, **{"sasl.mechanism": mechanism, "debug": "all", "log_level": 7})
    live = simulate(60, 0.2, 21)
    made.produce(
        (
            event.block_id,
            json.dumps({"block_id": event.block_id, "event_id": event.event_id, "timestamp": event.timestamp}),
        )
        for event in live.events
    )
    made.produce([(block, None) for block in live.blocks] + [(None, b"no event")])
    process = made.consume_all()
    alerts = made.read(made.settings.topics.alerts)
    assert len({message.key().decode() for message in alerts} & live.faults.keys()) >= 6
    assert len({message.value() for message in alerts}) == len(alerts), "none twice"
    assert len(made.read(made.settings.topics.dead_letters)) == 1
    assert SECRET not in process.log.read_text(), "even with librdkafka's debugging"


def test_with_the_documented_rights_lines_are_rekeyed(secured_line, knows_lines):
    made = secured_line(process="rekey", changes={"model": {"path": str(knows_lines / "model")}})
    topics = made.settings.topics
    process = made.start_consumer(options=["--rekey"])
    made.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    lines = [f"081109 2035{number:02} 7 INFO dfs.X: drop blk_{number}" for number in range(30)]
    made.produce([(None, text, number % 3) for number, text in enumerate(lines)] + [(None, None, 0)], topics.lines)
    made.wait_for(lambda: made.lag(topics.lines, f"{made.name}-rekey") == 0, what="committing all lines")
    assert made.stop(process)[0] == 0, process.log.read_text()
    assert len(made.read(topics.events)) == 30
    assert len(made.read(topics.dead_letters)) == 1
    assert SECRET not in process.log.read_text()


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (("Write", "log-events"), "may neither see nor create topic .*-events"),
        (("Read", "log-anomaly-transformer-rekey"), "Group authorization failed.*give the user Read.*-rekey"),
    ],
)
def test_a_right_that_the_rekeyer_lacks_is_one_sentence(secured_line, knows_lines, without, said):
    made = secured_line(without, process="rekey", changes={"model": {"path": str(knows_lines / "model")}})
    done = made.run("consumer", "--rekey", check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(f"error: .*{said}", done.stderr)


MISTAKES = {
    "wrong password": ({"sasl.password": WRONG}, None, "invalid credentials.*sasl.password"),
    "untrusted certificate": ({"ssl.ca.location": "other.pem"}, None, "certificate verify failed.*ssl.ca.location"),
    "cannot read events": ({}, ("Read", "log-events"), "may neither see nor create topic .*-events"),
    "cannot write state": ({}, ("Write", "log-anomaly-state"), "lacks rights on topics: Write on .*-state"),
    "not in the group": ({}, ("Read", "log-anomaly-transformer"), "Group authorization failed.*give the user Read"),
    "no transactions": (
        {},
        ("Write", "log-anomaly-transformer-"),
        "Transactional Id authorization failed.*give the user Write.*at_least_once",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_one_sentence_that_shows_no_secret(secured, secured_line, mistake):
    kafka, without, said = MISTAKES[mistake]
    if "ssl.ca.location" in kafka:
        kafka = {"ssl.ca.location": str(secured.folder / kafka["ssl.ca.location"])}
    done = secured_line(without, **kafka).run("consumer", check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [text for text in done.stderr.splitlines() if not re.match(r"[\d-]{10} [\d:,]+ INFO ", text)]
    assert len(errors) == 1, done.stderr
    assert re.search(f"^error: .*{said}", errors[0])
    for secret in (SECRET, WRONG):
        assert secret not in done.stdout + done.stderr
