"""What the simulator simulates: how one thing of a system lives, and how its life goes wrong.

A `System` is a function that draws one normal life, and a table of functions that each draw a life with one kind
of fault. A life is a list of (seconds since birth, event id) in any order. Each system is built from a few phases,
so that a fault reads as what it is: the same phases, one of them broken.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from random import Random

Life = list[tuple[float, str]]
"""What one block goes through: (seconds since its birth, event id), in any order."""

Draw = Callable[[Random], Life]
"""Draws one life; all its chances come from the given generator."""

_HOUR = 3600.0


@dataclass(frozen=True)
class System:
    """A kind of system: what its events say, how a block of it lives, and which faults may befall one."""

    name: str
    prefix: str
    templates: Mapping[str, str]
    life: Draw
    faults: Mapping[str, Draw]


def _lasting(random: Random, median: float, spread: float = 0.5) -> float:
    """Return a duration: log-normal, as waiting times in clusters are."""
    return random.lognormvariate(log(median), spread)


def _lifespan(random: Random) -> float:
    """Return how long a block is in use: 2 h as a median, at most 15 h, and most of that in silence."""
    return min(_lasting(random, 2 * _HOUR, spread=1.8), random.uniform(9, 15) * _HOUR)


# HDFS: a block is written to three replicas, read and verified now and then, and deleted.

_REPLICAS = 3
_READS = (  # readers that stop early are nothing unusual
    ("served", "served", "read_broken_off"),
    ("served", "read_broken_off", "served"),
    ("read_broken_off", "served", "read_broken_off"),
    ("read_broken_off", "read_broken_off", "served"),
)


def _write(random: Random, confirmed: int = _REPLICAS) -> tuple[Life, float]:
    """Return the write of a block and when it ends: three replicas begin, `confirmed` of them complete.

    Every line bears the clock of the node that wrote it. For a fifth of the blocks the name node's clock is behind
    the data nodes': it allocates first and has stored what they have yet to receive. Together with replicas that
    straggle, this gives a few orders to most blocks and hundreds of orders to the rest, as in real logs.
    """
    behind = random.random() < 0.2
    life = [(0.0 if behind else random.random(), "allocate")]
    life += [(0.1 + 0.25 * replica, "receive_start") for replica in range(_REPLICAS)]
    done = 1.0 + _lasting(random, 40.0, spread=0.7)
    report = -0.3 if behind else 0.2
    for _ in range(confirmed):
        done += _lasting(random, 0.03, spread=1.2)
        life += [
            (done, "responder_end"),
            (done + random.expovariate(1000), "received"),
            (done + report + random.expovariate(50), "stored"),
        ]
    return life, done + 1.0


def _use(random: Random, start: float, end: float) -> Life:
    """Return the reads and verifications between two moments; most blocks have none."""
    life: Life = []
    if random.random() < 0.25:
        for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):  # jobs; each reads the block three times
            moment = random.uniform(start, end)
            for event_id in random.choice(_READS):
                life.append((moment, event_id))
                moment += random.expovariate(1 / 30)
    if random.random() < 0.14:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            life.append((random.uniform(start, end), "verified"))
    return life


def _copy(random: Random, moment: float) -> Life:
    """Return one re-replication: the name node asks, a data node sends, another stores."""
    sent = moment + 2.0 + _lasting(random, 15.0)
    return [
        (moment, "replicate"),
        (moment + 1.0, "transfer_start"),
        (moment + 1.5, "receive_start"),
        (sent, "copy_received"),
        (sent + random.uniform(-0.1, 0.4), "transferred"),
        (sent + 0.5, "stored"),
    ]


def _delete(random: Random, moment: float, failing: int = 0) -> Life:
    """Return the deletion of a block: replicas are invalidated at once and deleted minutes later.

    `failing` of the replicas are tried up to three times and never go.
    """
    life = [(moment, "invalidate")] * _REPLICAS
    for replica in range(_REPLICAS):
        turn = moment + random.uniform(3, 300)
        if replica < failing:
            life += [(turn + 60 * attempt, "delete_error") for attempt in range(random.randint(1, 3))]
        else:
            if random.random() < 0.0003:  # also a normal deletion may need a second try
                life.append((turn - 2.0, "delete_error"))
            life.append((turn, "deleted"))
    return life


def _hdfs_block(random: Random) -> Life:
    life, written = _write(random)
    end = written + _lifespan(random)
    life += _use(random, written, end)
    if random.random() < 0.01:
        life += _copy(random, random.uniform(written, end))
    if random.random() < 0.8:  # the others outlive the log
        life += _delete(random, end + 300)
    return life


def _pipeline_exception(random: Random) -> Life:
    """One replica breaks off during the write; mostly the name node has the block copied later."""
    life, written = _write(random, confirmed=_REPLICAS - 1)
    broken = random.uniform(1.0, written)
    life += [
        (broken, "write_exception"),
        (broken + random.expovariate(10), "mirror_exception"),
        (broken + random.expovariate(10), "responder_interrupted"),
    ]
    end = written + _lifespan(random)
    if random.random() < 0.7:
        life += _copy(random, written + 60)
    return life + _use(random, written, end) + _delete(random, end + 300)


def _missing_replica(random: Random) -> Life:
    """One of three replicas is never heard of again, and nobody complains."""
    life, written = _write(random, confirmed=_REPLICAS - 1)
    end = written + _lifespan(random)
    return life + _use(random, written, end) + _delete(random, end + 300)


def _truncated_write(random: Random) -> Life:
    """The writer dies: the log of the block ends in the middle of its write."""
    life = sorted(_write(random)[0])
    return life[: random.randrange(1, len(life))]


def _replication_storm(random: Random) -> Life:
    """The name node has the block copied over and over; each line of it is normal."""
    life, written = _write(random)
    end = written + _lifespan(random)
    life += _use(random, written, end)
    storm = random.uniform(written, end)
    for _ in range(random.randint(4, 9)):
        life += _copy(random, storm)
        storm += _lasting(random, 40.0)
    return life + _delete(random, max(storm, end) + 300)


def _failed_delete(random: Random) -> Life:
    """One to three replicas cannot be deleted, whatever is tried."""
    life, written = _write(random)
    end = written + _lifespan(random)
    return life + _use(random, written, end) + _delete(random, end + 300, failing=random.randint(1, _REPLICAS))


HDFS = System(
    name="hdfs",
    prefix="blk_",
    templates={
        "allocate": "Allocating block <block> for file <file>",
        "receive_start": "Receiving block <block> from <source>",
        "responder_end": "Responder <number> of block <block> ends",
        "received": "Received block <block>, <size> bytes, from <source>",
        "stored": "Block <block> is stored on <node>, <size> bytes",
        "served": "Sent block <block> to <reader>",
        "read_broken_off": "Reader <reader> broke off block <block>",
        "verified": "Checksum of block <block> is right",
        "replicate": "Asking <node> to copy block <block> to <target>",
        "transfer_start": "Sending block <block> to <target>",
        "copy_received": "Received copy of block <block> from <source>",
        "transferred": "Copy of block <block> has reached <target>",
        "invalidate": "Block <block> on <node> is to be deleted",
        "deleted": "File <file> of block <block> is deleted",
        "delete_error": "Cannot delete block <block>: <reason>",
        "write_exception": "Write of block <block> failed: <reason>",
        "mirror_exception": "Cannot pass block <block> on to <target>: <reason>",
        "responder_interrupted": "Responder of block <block> was interrupted",
    },
    life=_hdfs_block,
    faults={
        "pipeline_exception": _pipeline_exception,
        "missing_replica": _missing_replica,
        "truncated_write": _truncated_write,
        "replication_storm": _replication_storm,
        "failed_delete": _failed_delete,
    },
)
"""Blocks of a distributed file system."""


# Virtual machines: one is placed, provided for, booted and used. Every normal one is deleted in the end.


def _provide(random: Random, volume: bool) -> tuple[Life, float]:
    """Return how a machine gets a host, then at once an image, a network and perhaps a volume; and until when."""
    scheduled = random.expovariate(2)
    claimed = scheduled + random.expovariate(2)
    life = [(0.0, "vm_requested"), (scheduled, "vm_scheduled"), (claimed, "resources_claimed")]
    if random.random() < 0.8:
        image = claimed + 0.2
        life.append((image, "image_cached"))
    else:
        image = claimed + _lasting(random, 30.0)
        life += [(claimed + 0.2, "image_fetch"), (image, "image_fetched")]
    network = claimed + 0.5 + _lasting(random, 0.3)
    life += [(claimed + 0.5, "network_allocated"), (network, "network_plugged")]
    if volume:
        life += [(claimed + 0.7, "volume_created"), (claimed + 0.7 + _lasting(random, 1.0), "volume_attached")]
    return life, max(moment for moment, _ in life) + 0.5


def _boot(random: Random, moment: float) -> Life:
    return [(moment, "boot_started"), (moment + _lasting(random, 20.0), "boot_finished")]


def _migrate(random: Random, moment: float) -> Life:
    copied = moment + _lasting(random, 30.0)
    return [(moment, "migration_started"), (copied, "memory_copied"), (copied + 1.0, "migrated")]


def _resize(_: Random, moment: float) -> Life:
    return [(moment, "resize_requested"), (moment + 5.0, "resized")]


def _snapshot(random: Random, moment: float) -> Life:
    return [(moment, "snapshot_started"), (moment + _lasting(random, 60.0), "snapshot_stored")]


def _work(random: Random, start: float, end: float) -> Life:
    """Return heartbeats and now and then an operation, each in a stretch of time of its own."""
    life: Life = [(random.uniform(start, end), "heartbeat") for _ in range(random.choice((1, 2, 2, 2, 3, 4, 6, 8)))]
    operations = random.choices((0, 1, 2, 3), (70, 20, 7, 3))[0]
    for turn in range(operations):
        # At least 1,000 seconds each: an operation is over before the next begins.
        moment = start + (end - start) * turn / operations
        life += random.choices((_resize, _snapshot, _migrate, _boot), (2, 4, 2, 3))[0](random, moment)
    return life


def _shut_down(random: Random, moment: float) -> tuple[Life, float]:
    off = moment + _lasting(random, 5.0)
    return [(moment, "shutdown_requested"), (off, "powered_off")], off


def _clean_up(random: Random, off: float, volume: bool) -> Life:
    life = [(off + _lasting(random, 1.0), "network_unplugged"), (off + _lasting(random, 3.0), "disk_deleted")]
    if volume:
        life.append((off + _lasting(random, 1.0), "volume_detached"))
    end = max(moment for moment, _ in life)
    return [*life, (end + 0.1, "resources_released"), (end + 0.2, "vm_deleted")]


def _until_shutdown(random: Random, volume: bool, broken: Draw | None = None) -> tuple[Life, float]:
    """Return a life up to power-off, and when that is; `broken` draws what goes wrong on the way."""
    life, provided = _provide(random, volume)
    life += _boot(random, provided)
    start = provided + 600
    end = start + 3000 + _lifespan(random)
    life += _work(random, start, end)
    if broken is not None:
        moment = random.uniform(start, end)
        life += [(moment + delay, event_id) for delay, event_id in broken(random)]
        end += 3000  # longer than any of them lasts
    shutdown, off = _shut_down(random, end)
    return life + shutdown, off


def _has_volume(random: Random) -> bool:
    return random.random() < 0.6


def _vm(random: Random, broken: Draw | None = None) -> Life:
    volume = _has_volume(random)
    life, off = _until_shutdown(random, volume, broken)
    return life + _clean_up(random, off, volume)


def _stuck_boot(random: Random) -> Life:
    """The machine is started again and again, never comes up, and is given up."""
    volume = _has_volume(random)
    life, moment = _provide(random, volume)
    for _ in range(random.randint(2, 5)):
        life.append((moment, "boot_started"))
        moment += _lasting(random, 300.0)
    shutdown, off = _shut_down(random, moment)
    return life + shutdown + _clean_up(random, off, volume)


def _failed_migration(random: Random) -> Life:
    """A migration fails while memory is copied, and the machine stays where it is."""

    def fail(random: Random) -> Life:
        failed = _lasting(random, 30.0)
        return [(0.0, "migration_started"), (failed, "migration_failed"), (failed + 2.0, "rolled_back")]

    return _vm(random, fail)


def _migration_loop(random: Random) -> Life:
    """The machine is sent from host to host; each line of it is normal."""

    def loop(random: Random) -> Life:
        return [line for turn in range(random.randint(5, 12)) for line in _migrate(random, 200.0 * turn)]

    return _vm(random, loop)


def _lost_volume(random: Random) -> Life:
    """The volume fails under the running machine, so that there is none to detach in the end."""

    def lose(random: Random) -> Life:
        return [(float(turn), "volume_error") for turn in range(random.randint(1, 4))]

    life, off = _until_shutdown(random, volume=True, broken=lose)
    return life + _clean_up(random, off, volume=False)


def _leak(random: Random) -> Life:
    """The machine is switched off and at least one of its resources is never given back."""
    volume = _has_volume(random)
    life, off = _until_shutdown(random, volume)
    cleaned = sorted(_clean_up(random, off, volume))
    return life + cleaned[: random.randrange(len(cleaned) - 1)]


VM = System(
    name="vm",
    prefix="vm-",
    templates={
        "vm_requested": "Machine <vm> of size <size> requested by <user>",
        "vm_scheduled": "Machine <vm> is placed on host <host>",
        "resources_claimed": "Claimed <cpus> CPUs and <memory> for machine <vm>",
        "image_cached": "Image <image> of machine <vm> is in the cache",
        "image_fetch": "Fetching image <image> for machine <vm>",
        "image_fetched": "Fetched image <image> for machine <vm> in <seconds> s",
        "network_allocated": "Machine <vm> gets address <address>",
        "network_plugged": "Port <port> of machine <vm> is up",
        "volume_created": "Volume <volume> made for machine <vm>",
        "volume_attached": "Volume <volume> attached to machine <vm>",
        "boot_started": "Starting machine <vm>",
        "boot_finished": "Machine <vm> is up after <seconds> s",
        "heartbeat": "Machine <vm> is well",
        "resize_requested": "Resizing machine <vm> to <size>",
        "resized": "Machine <vm> now has size <size>",
        "snapshot_started": "Taking snapshot <snapshot> of machine <vm>",
        "snapshot_stored": "Snapshot <snapshot> of machine <vm> is stored",
        "migration_started": "Moving machine <vm> to host <host>",
        "memory_copied": "Memory of machine <vm> copied to host <host>",
        "migrated": "Machine <vm> now runs on host <host>",
        "shutdown_requested": "Shutting machine <vm> down",
        "powered_off": "Machine <vm> is off",
        "network_unplugged": "Port <port> of machine <vm> removed",
        "volume_detached": "Volume <volume> detached from machine <vm>",
        "disk_deleted": "Disk of machine <vm> deleted",
        "resources_released": "Released what machine <vm> had claimed",
        "vm_deleted": "Machine <vm> is gone",
        "migration_failed": "Moving machine <vm> to host <host> failed: <reason>",
        "rolled_back": "Machine <vm> stays on host <host>",
        "volume_error": "Volume <volume> of machine <vm> does not answer",
    },
    life=_vm,
    faults={
        "stuck_boot": _stuck_boot,
        "failed_migration": _failed_migration,
        "migration_loop": _migration_loop,
        "lost_volume": _lost_volume,
        "leak": _leak,
    },
)
"""Virtual machines of a cloud."""

SYSTEMS: Mapping[str, System] = {system.name: system for system in (HDFS, VM)}
"""Every system, by name."""
