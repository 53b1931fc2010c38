"""`python -m scripts.local_kafka up|status|down`: a real single-node Apache Kafka on this machine.

Its jars come once from Maven into a cache. It listens on loopback only, and all that it writes is in one folder.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from model.cli import console, run
from model.errors import UserError

_ROOT = Path(__file__).parents[1]
_HERE = Path(__file__).with_name("kafka")
_ELSE = "or name any running broker in kafka.bootstrap.servers"
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0

_PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "inter.broker.listener.name": "PLAINTEXT",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "10",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "10",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "auto.create.topics.enable": "false",
    "log.retention.ms": "-1",
    "log.segment.bytes": str(256 << 20),
}


@dataclass
class LocalKafka:
    """A broker whose data, log and process id are in `folder` and which listens on 127.0.0.1:`port`.

    `properties` are further server properties; `heap` is the JVM's -Xmx.
    """

    folder: Path = _ROOT / ".cache" / "kafka" / "data"
    port: int = 9092
    cache: Path = _ROOT / ".cache" / "kafka"
    properties: Mapping[str, str] = field(default_factory=dict)
    heap: str = "1g"

    @property
    def bootstrap(self) -> str:
        """What belongs into kafka.bootstrap.servers."""
        return f"127.0.0.1:{self.port}"

    def up(self) -> bool:
        """Start the broker and return when it answers; False when it was up already.

        Raises:
            UserError: Java or Maven is missing, the port is taken, or the broker does not start.
        """
        if self.pid is not None:
            self._wait()
            return False
        if _taken(self.port):
            raise UserError(f"port {self.port} is taken by another program; choose one with --port")
        java = _java()
        classpath = f"{self._jars()}/*"
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.folder / "server.properties"
        settings.write_text("".join(f"{key}={value}\n" for key, value in self._all_properties().items()))
        if not (self.folder / "data" / "meta.properties").is_file():
            cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")
            command = [java, "-Xmx256m", "-cp", classpath, "kafka.tools.StorageTool"]
            done = subprocess.run(
                [*command, "format", "-t", cluster, "-c", str(settings)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise UserError(f"{self.folder}: Kafka cannot format its storage: {_last_line(done.stderr)}")
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [
                    java, "-Xms256m", f"-Xmx{self.heap}",
                    f"-Dlog4j2.configurationFile={_HERE / 'log4j2.yaml'}",
                    "-cp", classpath, "kafka.Kafka", str(settings),
                ],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=self.folder,
            )  # fmt: skip
        self._pid_file.write_text(f"{process.pid}\n")
        self._wait(process)
        return True

    def down(self, *, purge: bool = False) -> bool:
        """Stop the broker, with `purge` also remove its folder; False when it was not up."""
        pid = self.pid
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            if not self._gone(pid, _STOP_SECONDS):
                self.kill()
        if purge:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._pid_file.unlink(missing_ok=True)
        return pid is not None

    def kill(self) -> None:
        """End the broker at once, as a crash would. `up` starts it again on its data."""
        pid = self.pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            self._gone(pid, _STOP_SECONDS)

    @property
    def pid(self) -> int | None:
        """The broker's process id, None when it does not run."""
        try:
            pid = int(self._pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if _is_broker(pid) else None

    def _all_properties(self) -> dict[str, str]:
        control = _free_port()
        return {
            **_PROPERTIES,
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{control}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "controller.quorum.voters": f"1@127.0.0.1:{control}",
            "log.dirs": str(self.folder / "data"),
            **self.properties,
        }

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    @property
    def _log(self) -> Path:
        return self.folder / "kafka.log"

    def _jars(self) -> Path:
        """Return the folder of jars, fetched first if need be; half a fetch is never mistaken for a whole one."""
        pom = (_HERE / "pom.xml").read_text()
        version = re.search(r"<artifactId>kafka_2.13</artifactId>\s*<version>([^<]+)", pom)
        jars = self.cache / f"jars-{version[1] if version else 'unknown'}"
        if jars.is_dir():
            return jars
        maven = shutil.which("mvn")
        if maven is None:
            raise UserError(f"Maven (mvn) is not installed, and Kafka's jars come with it; install it, {_ELSE}")
        self.cache.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=self.cache) as fresh,
            console.status("fetching Apache Kafka with Maven, once (about 50 MB)"),
        ):
            goal = ["dependency:copy-dependencies", f"-DoutputDirectory={fresh}/jars", "-DincludeScope=runtime"]
            command = [maven, "-q", "-B", "-f", str(_HERE / "pom.xml"), *goal]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"Maven cannot fetch Kafka: {_last_line(done.stdout)}; check the network, {_ELSE}")
            if not jars.is_dir():
                Path(fresh, "jars").rename(jars)
        return jars

    def _wait(self, process: subprocess.Popen[bytes] | None = None) -> None:
        deadline = time.monotonic() + _START_SECONDS
        with console.status(f"waiting for Kafka at {self.bootstrap}"):
            client = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0, "error_cb": lambda _: None})
            while time.monotonic() < deadline:
                if process is not None and process.poll() is not None:
                    self._pid_file.unlink(missing_ok=True)
                    raise UserError(f"Kafka ended at once: {_last_line(self._log.read_text())} (see {self._log})")
                try:
                    client.list_topics(timeout=1)
                except KafkaException:
                    continue
                return
        raise UserError(f"Kafka did not answer at {self.bootstrap} within {_START_SECONDS:.0f} s; see {self._log}")

    @staticmethod
    def _gone(pid: int, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # if it is our child, do not leave a zombie
            if not _is_broker(pid):
                return True
            time.sleep(0.05)
        return False


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else None
    java = java or shutil.which("java")
    if java is None:
        raise UserError(f"Java is not installed, and Kafka needs Java 17 or newer; install it, {_ELSE}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < 17:
        shown = version[1] if version else "unknown"
        raise UserError(f"{java} is Java {shown}, and Kafka needs 17 or newer; install one, {_ELSE}")
    return java


def _is_broker(pid: int) -> bool:
    """Say whether this process is a Kafka broker, and not another one that was given its number later."""
    done = subprocess.run(["ps", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return "kafka.Kafka" in done.stdout and not done.stdout.startswith("Z")


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def main() -> int:
    """Do what the command says."""
    parser = argparse.ArgumentParser(prog="python -m scripts.local_kafka", description="A real Kafka on this machine.")
    parser.add_argument("command", choices=("up", "status", "down"))
    parser.add_argument("--port", type=int, default=9092, help="port on 127.0.0.1 (default: 9092)")
    parser.add_argument("--dir", type=Path, default=LocalKafka.folder, help="folder of all its data")
    parser.add_argument("--purge", action="store_true", help="with down: also remove that folder")
    arguments = parser.parse_args()
    kafka = LocalKafka(arguments.dir.resolve(), arguments.port)
    if arguments.command == "up":
        started = kafka.up()
        console.print(f"Kafka is {'up' if started else 'up already'} at {kafka.bootstrap}, data in {kafka.folder}")
        return 0
    if arguments.command == "down":
        stopped = kafka.down(purge=arguments.purge)
        console.print("Kafka is down" if stopped else "Kafka was not up")
        return 0
    console.print(f"Kafka is {'up' if kafka.pid else 'down'}, data in {kafka.folder}")
    return 0 if kafka.pid else 1


if __name__ == "__main__":
    run(main)
