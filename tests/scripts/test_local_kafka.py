import socket
import subprocess
import sys
import time

import pytest

from model.errors import UserError
from scripts import local_kafka
from scripts.local_kafka import LocalKafka, free_port

OTHER_BROKER = "kafka.bootstrap.servers"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Replace every program on the PATH by the given shell scripts."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)

    def install(**scripts):
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return install


@pytest.fixture
def kafka(tmp_path):
    broker = LocalKafka(tmp_path / "data", free_port(), cache=tmp_path / "cache")
    yield broker
    broker.kill()


def java(version="17.0.2", broker="exit 1"):
    """Return a Java that knows its version, formats any storage, and runs `broker` as the broker."""
    return f"""case "$*" in
        -version) echo 'openjdk version "{version}" 2025-04-15' >&2 ;;
        *StorageTool*) ;;
        *) {broker} ;;
    esac"""


MAVEN = 'for last; do case $last in -Doutput*) /bin/mkdir "${last#*=}" ;; esac; done'


@pytest.mark.usefixtures("tools")
def test_java_is_needed(kafka):
    with pytest.raises(UserError, match=f"Java 17 or newer, and there is none on the PATH.*{OTHER_BROKER}"):
        kafka.up()


@pytest.mark.parametrize("version", ["1.8.0_392", "11.0.2", "16"])
def test_an_old_java_will_not_do(kafka, tools, version):
    tools(java=java(version))
    with pytest.raises(UserError, match=f"Java 17 or newer, and .*bin/java is not.*{OTHER_BROKER}"):
        kafka.up()


@pytest.mark.parametrize("version", ["17", "17.0.2", "21.0.1", "25-ea"])
def test_java_17_and_newer_will_do(tools, version):
    tools(java=java(version))
    assert local_kafka._java().endswith("bin/java")


def test_the_java_of_java_home_comes_first(tools, tmp_path, monkeypatch):
    tools(java=java("17"))
    (tmp_path / "home/bin").mkdir(parents=True)
    chosen = (tmp_path / "bin/java").rename(tmp_path / "home/bin/java")
    tools(java=java("11"))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert local_kafka._java() == str(chosen)
    chosen.unlink()
    with pytest.raises(UserError, match=r"none in JAVA_HOME \(.*home\)"):
        local_kafka._java()


def test_maven_is_needed(kafka, tools):
    tools(java=java())
    with pytest.raises(UserError, match=f"Maven .* is not installed.*{OTHER_BROKER}"):
        kafka.up()


def test_a_fetch_that_fails_leaves_nothing_behind(kafka, tools):
    tools(java=java(), mvn=f"{MAVEN}; echo '[ERROR] no route to host'; exit 1")
    with pytest.raises(UserError, match=f"no route to host.*{OTHER_BROKER}"):
        kafka.up()
    assert not list(kafka.cache.iterdir())


def test_jars_are_fetched_once(kafka, tools, tmp_path):
    tools(java=java(), mvn=f"echo fetch >> {tmp_path}/fetches; {MAVEN}")
    for _ in range(2):
        with pytest.raises(UserError, match="ended while it started"):
            kafka.up()
    assert (tmp_path / "fetches").read_text() == "fetch\n"
    assert [path.name.startswith("jars-4.") for path in kafka.cache.iterdir()] == [True]


def test_a_broker_that_dies_early_is_quoted(kafka, tools):
    tools(mvn=MAVEN, java=java(broker="for n in 1 2 3 4 5 6 7 8 9 10 11 12; do echo line $n; done; exit 1"))
    with pytest.raises(UserError, match=r"ended while it started.*:\nline 3\n(.*\n)*line 12$"):
        kafka.up()
    assert not kafka.is_up()


def test_storage_that_cannot_be_formatted_is_quoted(kafka, tools):
    tools(mvn=MAVEN, java=java().replace("*StorageTool*)", "*StorageTool*) echo disk full; exit 1"))
    with pytest.raises(UserError, match=r"cannot format its storage.*\ndisk full"):
        kafka.up()


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
def test_a_port_in_use_is_an_error(kafka, tools, address):
    tools(java=java(), mvn=MAVEN)
    with socket.create_server((address, kafka.port)), pytest.raises(UserError, match=f"port {kafka.port} is in use"):
        kafka.up()


def test_a_broker_that_never_answers_is_given_up_and_ended(kafka, tools, monkeypatch):
    tools(mvn=MAVEN, java=java(broker="exec /bin/sleep 100"))
    monkeypatch.setattr(local_kafka, "_START_SECONDS", 0)
    with pytest.raises(UserError, match="did not answer"):
        kafka.up()
    assert not kafka._runs()


def test_down_insists(kafka, tools, monkeypatch):
    tools(mvn=MAVEN, java=java(broker="trap '' TERM; exec /bin/sleep 100"))
    monkeypatch.setattr(local_kafka, "_STOP_SECONDS", 0.5)
    monkeypatch.setattr(LocalKafka, "_await_answer", lambda _: time.sleep(0.2))
    assert kafka.up()
    assert not kafka.up()
    assert kafka.down(purge=True)
    assert not kafka.folder.exists()
    assert kafka.cache.exists()


def test_another_port_than_the_running_one_is_an_error(kafka, tools, monkeypatch):
    tools(mvn=MAVEN, java=java(broker="exec /bin/sleep 100"))
    monkeypatch.setattr(LocalKafka, "_await_answer", lambda _: None)
    kafka.up()
    with pytest.raises(UserError, match=f"up on another port, {kafka.port}"):
        LocalKafka(kafka.folder, kafka.port + 1, kafka.cache).up()


@pytest.mark.parametrize("content", ["", "999999999\n", "self"])
def test_a_stale_process_id_harms_nobody(kafka, content):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        kafka.folder.mkdir()
        (kafka.folder / "local_kafka.pid").write_text(content.replace("self", str(bystander.pid)))
        assert not kafka.is_up()
        kafka.kill()
        assert not kafka.down(purge=True)
        assert bystander.poll() is None
        bystander.communicate(b"\n")
    assert not kafka.folder.exists()


def test_a_folder_of_something_else_is_never_used_nor_purged(kafka):
    kafka.folder.mkdir()
    (kafka.folder / "thesis.tex").touch()
    with pytest.raises(UserError, match="has other things in it"):
        kafka.up()
    kafka.down(purge=True)
    assert (kafka.folder / "thesis.tex").exists()


def test_a_folder_that_cannot_be_made_is_an_error(kafka):
    kafka.folder.touch()
    with pytest.raises(UserError, match="cannot keep Kafka's data in"):
        kafka.up()
    kafka.folder.unlink()


def test_properties_replace_ours_and_listeners_are_added(kafka):
    kafka.properties = {"listeners": "TLS://127.0.0.1:1", "log.retention.ms": "5"}
    properties = kafka._server_properties()
    assert properties["log.retention.ms"] == "5"
    assert properties["listeners"].startswith(f"BROKER://127.0.0.1:{kafka.port},CONTROLLER://127.0.0.1:")
    assert properties["listeners"].endswith(",TLS://127.0.0.1:1")
    assert properties["listener.security.protocol.map"] == "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT"


def test_the_command_says_that_nothing_runs(tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "scripts.local_kafka", *arguments, "--dir", str(tmp_path / "none")],
            capture_output=True,
            text=True,
            check=False,
        )

    assert (command("status").returncode, command("status").stdout) == (1, "Kafka is down\n")
    assert (command("down").returncode, command("down").stdout) == (0, "Kafka was not running\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_that_cannot_be_is_one_sentence(monkeypatch, port):
    monkeypatch.setattr(sys, "argv", ["local_kafka", "up", "--port", port])
    with pytest.raises(UserError, match=f"^--port {port}: a number from 1 to 65535 is needed$"):
        local_kafka.main()
