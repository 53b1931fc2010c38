"""A trained model on disk: weights, vocabulary, hyper-parameters, training facts, fingerprint. Never pickled."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from os.path import realpath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from msgspec import MsgspecError
from safetensors import SafetensorError
from safetensors.torch import load as unpack
from safetensors.torch import save as pack

from model.errors import UserError
from model.lines import LineFormat
from model.network import Autoencoder, Shape
from model.vocabulary import Vocabulary

FORMAT = 2
"""Version of the folder's layout."""

_WEIGHTS, _FACTS = "weights.safetensors", "model.json"


@dataclass(frozen=True)
class Bundle:
    """A network with the vocabulary it speaks. `training` holds facts for people; nothing depends on them.

    `lines` says how raw log lines become events of the vocabulary; None if the model was trained on events.
    """

    network: Autoencoder
    vocabulary: Vocabulary
    training: Mapping[str, Any] = field(default_factory=dict)
    lines: LineFormat | None = None

    def __str__(self) -> str:
        return f"model {self.fingerprint[:12]}"

    @property
    def window(self) -> int:
        """Newest events of a session that the network sees."""
        return self.network.shape.window

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that a score depends on: weights, their shapes, vocabulary, hyper-parameters, lines."""
        digest = hashlib.sha256()
        digest.update(json.dumps([asdict(self.network.shape), self.vocabulary.events]).encode())
        if self.lines is not None:
            digest.update(msgspec.json.encode(self.lines))
        for name, weight in sorted(self.network.state_dict().items()):
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def files(folder: Path) -> tuple[Path, ...]:
        """Return the files that make up a bundle."""
        return folder / _FACTS, folder / _WEIGHTS

    @staticmethod
    def check_place(folder: Path) -> None:
        """Make sure that a bundle can be written to `folder`: training takes minutes.

        Raises:
            UserError: the folder holds something else, or cannot be written.
        """
        with _beside(Path(realpath(folder))):
            if folder.exists() and not (folder / _FACTS).is_file():
                raise UserError(f"{folder}: exists and is no model bundle; name another folder with --out")

    def save(self, folder: Path) -> None:
        """Write the bundle to `folder`, replacing a bundle that is there.

        It is written beside and moved, so that a reader never finds half of it. A link to a bundle stays one: what it
        leads to is replaced.

        Raises:
            UserError: as `check_place`.
        """
        folder = Path(realpath(folder))
        self.check_place(folder)
        facts = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "shape": asdict(self.network.shape),
            "parameters": self.network.parameter_count,
            "events": self.vocabulary.events,
            "templates": dict(self.vocabulary.templates),
            "training": dict(self.training),
            "lines": msgspec.to_builtins(self.lines),
        }
        with _beside(folder) as beside:
            fresh, old = beside / "new", beside / "old"
            fresh.mkdir()  # not the temporary folder itself, which only its owner may read
            weights = {name: weight.contiguous() for name, weight in self.network.state_dict().items()}
            (fresh / _WEIGHTS).write_bytes(pack(weights))  # save_file lets nobody else read it, whatever the umask says
            (fresh / _FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if folder.exists():
                folder.rename(old)
            try:
                fresh.rename(folder)
            except BaseException:
                if old.exists():
                    old.rename(folder)
                raise

    @classmethod
    def load(cls, folder: Path) -> "Bundle":
        """Read the bundle in `folder`; its network is in eval mode on the CPU.

        Raises:
            UserError: there is none, it cannot be read, it is damaged, or another version wrote it.
        """
        again = "train one with: python -m model --normal FILE --out " + str(folder)
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise UserError(f"{folder}: bundle format {facts['format']}, but this version reads {FORMAT}; {again}")
            network = Autoencoder(Shape(**facts["shape"]))
            network.load_state_dict(unpack((folder / _WEIGHTS).read_bytes()))
            vocabulary = Vocabulary(tuple(facts["events"]), facts["templates"])
            lines = msgspec.convert(facts.get("lines"), LineFormat | None)
            bundle = cls(network.eval(), vocabulary, facts["training"], lines)
            intact = bundle.fingerprint == facts["fingerprint"]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder}: no model bundle there; {again}") from None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{folder}: cannot read the model bundle ({reason}); mend that, or {again}") from None
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError, MsgspecError):
            raise UserError(f"{folder}: the model bundle is damaged; {again}") from None
        if not intact:
            raise UserError(f"{folder}: the bundle's fingerprint does not match its contents; {again}")
        return bundle


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Enter with a temporary folder beside another.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as beside:
            yield Path(beside)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the model bundle ({error.strerror or error})") from None
