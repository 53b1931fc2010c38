import logging
import signal
import subprocess
import sys
import time

import pytest
from confluent_kafka import KafkaError, KafkaException

from consumer.patience import NOT_COMMITTED, Patience, is_passing
from model.errors import UserError

STOPPED = """
import logging, os, signal, threading, time
from consumer import patience
logging.basicConfig()
patience._SILENCE_SECONDS = 0.5
one = patience.Patience()
one.uncommitted = {uncommitted}
one.end_on(signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
for _ in range({answers}):
    time.sleep(0.2)
    one.heard()
lock = threading.Lock()
with lock:
    lock.acquire()  # as a call of librdkafka that does not return
"""


@pytest.mark.parametrize(("uncommitted", "status"), [(0, 0), (1234, NOT_COMMITTED)])
@pytest.mark.parametrize("answers", [0, 10])
def test_a_stop_ends_once_brokers_are_silent_even_in_a_call_that_does_not_return(uncommitted, status, answers):
    code = STOPPED.format(uncommitted=uncommitted, answers=answers)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status, said
    assert "told to stop, and no broker has answered" in said
    assert ("1,234 events were read" in said) == bool(uncommitted)
    assert time.monotonic() - began >= 0.2 * answers + 0.5


def test_what_comes_to_nothing_again_and_again_is_tried_less_and_less_often_until_a_commit():
    patience, waited = Patience(), []
    for _ in range(4):
        began = time.monotonic()
        patience.begin_anew()
        waited.append(time.monotonic() - began)
    assert waited[0] < 0.1
    assert waited[3] > waited[2] > waited[1] >= 0.2
    patience.committed()
    began = time.monotonic()
    patience.begin_anew()
    assert time.monotonic() - began < 0.1


def test_trouble_is_said_once_in_a_while_for_each_kind(caplog):
    patience = Patience()
    with caplog.at_level(logging.WARNING, "consumer"):
        for _ in range(100):
            patience.retry(KafkaError(KafkaError._TIMED_OUT, "slow"))
            patience.notice(KafkaError(KafkaError._TRANSPORT, "gone"))
    assert caplog.messages == ["kafka: slow; trying again until it works", "kafka: gone"]


@pytest.mark.parametrize("code", [KafkaError._AUTHENTICATION, KafkaError.UNKNOWN_TOPIC_OR_PART])
def test_what_waiting_does_not_mend_is_not_waited_for(code):
    patience = Patience()
    patience.check()
    patience.notice(KafkaError(code, "refused for good"))
    assert not is_passing(KafkaError(code))
    for ask in (patience.check, lambda: patience.retry(KafkaError(KafkaError._TIMED_OUT))):
        with pytest.raises(UserError, match="refused for good"):
            ask()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_nothing_else(number):
    code = (
        "import os, signal, time\nfrom consumer.patience import Patience\n"
        f"one = Patience()\none.end_on(signal.{number.name})\nassert not one.stop_asked\n"
        f"os.kill(os.getpid(), signal.{number.name})\ntime.sleep(0.5)\nassert one.stop_asked\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "code",
    [
        KafkaError._TRANSPORT,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.LEADER_NOT_AVAILABLE,
    ],
)
def test_what_brokers_say_after_a_restart_is_asked_again(code):
    class Client:
        def poll(self, _):
            pass

    answers = [KafkaException(KafkaError(code)), None]

    def call():
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return "done"

    assert Patience().ask(Client(), call) == "done"
