"""`python -m scripts.local_kafka up|status|down`: a real single-node Apache Kafka on this machine.

Its jars come from Maven, once. It listens on the loopback address only, and all that it writes is in one folder.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from hashlib import sha256
from pathlib import Path
from random import SystemRandom
from tempfile import TemporaryDirectory
from uuid import uuid4

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from model.cli import console, run
from model.errors import UserError

_CACHE = Path(__file__).parents[1] / ".cache" / "kafka"
_POM = Path(__file__).parent / "kafka" / "pom.xml"
_LOGGING = _POM.with_name("log4j2.properties")
_INSTEAD = "or use any other broker: name it in kafka.bootstrap.servers"
_SETTINGS = "server.properties"
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0

_PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "BROKER",
    "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    "offsets.topic.num.partitions": "10",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "10",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",  # how long a killed broker must wait before it is let in again: 9 s by default
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",  # lets a test notice a dead consumer sooner than after 6 s
    "log.retention.ms": "-1",  # replayed logs are years old: Kafka would delete them while they are read
}
_ADDED = ("listeners", "listener.security.protocol.map")


QUICK_ABORTS = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000"}
"""Server property for trials that kill clients: a transaction that timed out is aborted within a second, not ten."""


@dataclass
class LocalKafka:
    """A broker at 127.0.0.1:`port` whose data, settings, log and process id are in `folder`.

    `cache` is where jars are kept between brokers. `properties` are further server properties; they replace those
    set here, except that listeners and their protocols are added to the plaintext one at `port`.

    The process-id file is locked for as long as the broker lives, since a locked file handle is handed down to it.
    So a file that outlived its broker is known as stale, even when its number belongs to another process by now.
    """

    folder: Path = _CACHE / "data"
    port: int = 9092
    cache: Path = _CACHE
    properties: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()  # the broker runs in it, so that nothing is written elsewhere
        self.cache = self.cache.resolve()

    @property
    def bootstrap(self) -> str:
        """The broker's address, as kafka.bootstrap.servers wants it."""
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What the broker said since its last start."""
        return self.folder / "kafka.log"

    def is_up(self) -> bool:
        """Say whether this broker runs and answers."""
        return self._runs() and self._answers()

    def up(self) -> bool:
        """Start the broker and return when it answers; return False when it was running already.

        Raises:
            UserError: Java or Maven is missing, the jars cannot be fetched, the port or the folder is used by
                something else, or the broker does not come up.
        """
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self._pidfile.exists():
            raise UserError(f"{self.folder} has other things in it; name an empty or a new folder for Kafka's data")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot keep Kafka's data in {self.folder}: {error.strerror}; name another folder"
            ) from error
        with self._pidfile.open("a") as lock:
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                started = False
                self.require_port()
            else:
                started = True
                lock.truncate(0)
                self._start(lock.fileno())
        try:
            with console.status(f"Waiting for Kafka at {self.bootstrap}"):
                self._await_answer()
        except BaseException:
            if started:
                self.kill()
            raise
        return started

    def require_port(self) -> None:
        """Make sure that the broker, if it runs, is the one at `port`.

        Raises:
            UserError: it has another port.
        """
        if self._runs() and (port := recorded_port(self.folder)) not in (None, self.port):
            raise UserError(
                f"the Kafka in {self.folder} is up on another port, {port}; "
                "use that port, take it down first, or name another folder"
            )

    def down(self, *, purge: bool = False) -> bool:
        """Stop the broker, by force if it takes over 20 s; with `purge` remove its folder too.

        Returns False when it was not running.
        """
        ran = self._runs()
        if ran and not self._end(signal.SIGTERM):
            self.kill()
        if purge and self._pidfile.exists():  # never a folder that is not a broker's
            shutil.rmtree(self.folder)
        return ran

    def kill(self) -> None:
        """End the broker at once, as a crash would; `up` starts it again on the same data.

        Raises:
            UserError: It does not end.
        """
        if not self._end(signal.SIGKILL):
            raise UserError(f"Kafka in {self.folder} does not end; end the process that holds {self._pidfile}")

    @property
    def _pidfile(self) -> Path:
        return self.folder / "local_kafka.pid"

    def _runs(self) -> bool:
        try:
            with self._pidfile.open() as file:
                flock(file, LOCK_SH | LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _answers(self) -> bool:
        # The client would report on its own that nobody listens yet.
        client = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0, "error_cb": lambda _: None})
        try:
            return bool(client.list_topics(timeout=1).brokers)
        except KafkaException:
            return False

    def _start(self, lock: int) -> None:
        java, jars = _java(), self._jars()
        if not _is_free(self.port):
            raise UserError(f"port {self.port} is in use by another program; choose another port, {_INSTEAD}")
        settings = self.folder / _SETTINGS
        settings.write_text("".join(f"{key}={value}\n" for key, value in self._server_properties().items()))
        options = [f"-Dlog4j2.configurationFile={_LOGGING}", f"-Djava.io.tmpdir={self.folder}"]
        command = [java, "-Xms512m", "-Xmx1g", *options, "-cp", f"{jars}/*"]
        with self.log.open("wb") as log:
            if not (self.folder / "data" / "meta.properties").exists():
                cluster = urlsafe_b64encode(uuid4().bytes).decode().rstrip("=")
                tool = [*command, "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", str(settings)]
                if subprocess.run(tool, cwd=self.folder, stdout=log, stderr=log, check=False).returncode:
                    raise UserError(f"Kafka cannot format its storage; its last words:\n{self._last_words()}")
            # The shell ends at once and leaves the broker to the system: no zombie, no terminal, no Ctrl-C.
            subprocess.run(
                ["sh", "-c", '"$@" & echo $! > "$0"', self._pidfile, *command, "kafka.Kafka", settings],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,
                check=True,
            )

    def _server_properties(self) -> dict[str, str]:
        controller = free_port()  # only the broker itself uses it, so that each start may have another
        ours = _PROPERTIES | {
            "listeners": f"BROKER://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "log.dirs": str(self.folder / "data"),
        }
        added = {key: f"{ours[key]},{self.properties[key]}" for key in _ADDED if key in self.properties}
        return {**ours, **self.properties, **added}

    def _await_answer(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if not self._runs():
                raise UserError(f"Kafka ended while it started; its last words:\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise UserError(f"Kafka did not answer within {_START_SECONDS:.0f} s; {self.log} may say why")

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-10:]) or f"none; {self.log} is empty"

    def _end(self, number: signal.Signals) -> bool:
        """Send the broker a signal and say whether it ended in time."""
        if self._runs():
            with suppress(ProcessLookupError, ValueError):  # it has just ended, or is just being started
                os.kill(int(self._pidfile.read_text()), number)
        deadline = time.monotonic() + _STOP_SECONDS
        while self._runs():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _jars(self) -> Path:
        """Return the folder of jars, fetched first if need be."""
        pom = _POM.read_text()
        version = pom.split("<kafka.version>")[1].split("<")[0]
        jars = self.cache / f"jars-{version}-{sha256(pom.encode()).hexdigest()[:8]}"
        if jars.is_dir():
            return jars
        maven = shutil.which("mvn")
        if maven is None:
            raise UserError(f"Maven (mvn), which fetches Kafka, is not installed; install it, {_INSTEAD}")
        self.cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.cache) as fresh, console.status(f"Fetching Kafka {version} (43 MB, once)"):
            goal = ["dependency:copy-dependencies", f"-DoutputDirectory={fresh}/jars"]
            done = subprocess.run([maven, "-q", "-B", "-f", _POM, *goal], capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stdout + done.stderr).strip().partition("\n")[0] or "it does not say why"
                raise UserError(f"Maven cannot fetch Kafka: {reason}; check the network, {_INSTEAD}")
            with suppress(OSError):  # another one was quicker
                Path(fresh, "jars").rename(jars)
        return jars


def recorded_port(folder: Path) -> int | None:
    """Return the port that the broker in `folder` was last started with."""
    settings = folder / _SETTINGS
    found = re.search(r"BROKER://127\.0\.0\.1:(\d+)", settings.read_text()) if settings.exists() else None
    return int(found[1]) if found else None


def free_port() -> int:
    """Return a port that nobody uses.

    It lies below those given to outgoing connections: else a client that tries to reach a broker which is down might
    be given the broker's own port, and the broker could not come up again.
    """
    return next(port for port in SystemRandom().sample(range(20_000, 32_000), 1000) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do no harm
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _java() -> str:
    """Return JAVA_HOME's Java, or else the one on the PATH, if Kafka runs on it."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    if java is None:
        where = f"none in JAVA_HOME ({home})" if home else "none on the PATH"
        raise UserError(f"Kafka needs Java 17 or newer, and there is {where}; install it, {_INSTEAD}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < 17:
        raise UserError(f"Kafka needs Java 17 or newer, and {java} is not; install it, set JAVA_HOME, {_INSTEAD}")
    return java


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m scripts.local_kafka", description="A real Kafka on this machine.")
    parser.add_argument("command", choices=("up", "status", "down"))
    parser.add_argument(
        "--port", type=int, help=f"on 127.0.0.1 (default: {LocalKafka.port}; status, down: that of the broker in --dir)"
    )
    parser.add_argument(
        "--dir", type=Path, default=LocalKafka.folder, help="folder of its data (default: .cache/kafka/data)"
    )
    parser.add_argument("--purge", action="store_true", help="with down: remove the data too")
    arguments = parser.parse_args()
    if arguments.port is not None and not 0 < arguments.port < 2**16:
        raise UserError(f"--port {arguments.port}: a number from 1 to 65535 is needed")
    known = None if arguments.command == "up" else recorded_port(arguments.dir)
    kafka = LocalKafka(arguments.dir, arguments.port or known or LocalKafka.port)
    if arguments.command != "up":
        kafka.require_port()
    if arguments.command == "down":
        console.print("Kafka is down" if kafka.down(purge=arguments.purge) else "Kafka was not running")
        return 0
    began = time.monotonic()
    how = ""
    if arguments.command == "up":
        how = f" after {time.monotonic() - began:.1f} s" if kafka.up() else " already"
    elif not kafka.is_up():
        console.print("Kafka is down")
        return 1
    console.print(f"Kafka is up{how} at {kafka.bootstrap}")
    return 0


if __name__ == "__main__":
    run(main)
