"""Program A: `python -m coordinator.main coordinator.toml`. Safe to kill at any line."""

import gc
import json
import sys
import threading
from pathlib import Path

from coordinator.config import CoordinatorConfig, load_config
from protos import logs, systemd
from protos.config import ConfigError
from protos.process import die_with_parent, on_stop_signal

_LOG = logs.logger("coordinator.main")  # also when this file is the program


def main(argv: list[str]) -> int:
    """Run the coordinator of one coordinator.toml until SIGTERM or Ctrl-C.

    Returns: 0 stopped as asked, 1 ended by a fault (the log tells), 2 not started.
    """
    die_with_parent()
    if len(argv) != 1:
        sys.stderr.write("usage: python -m coordinator.main coordinator.toml\n")
        return 2
    try:
        config = load_config(Path(argv[0]))
        logs.configure("coordinator", level=config.log_level)
        return _run(config)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Exception as error:  # noqa: BLE001 - the one catch-all of the program: one line, status 1
        _LOG.critical("coordinator.failed", exc_info=error)
        return 1


def _run(config: CoordinatorConfig) -> int:
    gc.disable()  # nothing that is imported is garbage: to look for some takes a tenth of a start
    from coordinator.wiring import serving

    gc.enable()
    stop = threading.Event()
    on_stop_signal(stop.set)
    faults: list[BaseException] = []
    with serving(config) as running:
        gc.freeze()  # what is here now stays: no search for garbage makes a participant wait for it

        def schedule() -> None:
            try:
                running.scheduler.run()
            except Exception as error:  # noqa: BLE001 - told below; without its loop nothing works
                faults.append(error)
            stop.set()

        def give_up(reason: str) -> None:
            faults.append(RuntimeError(reason))
            stop.set()

        running.store.database.on_fatal = give_up
        ready = {
            "kind": "ready",
            "address": running.address,
            "engine_address": running.engine_address,
            "ops_address": running.ops_address,
        }
        if running.enroll_address:
            ready["enroll_address"] = running.enroll_address
        if running.console_url:
            ready["console_url"] = running.console_url
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        loop = threading.Thread(target=schedule, name="scheduler")
        loop.start()
        systemd.notify(systemd.READY)
        _LOG.info("coordinator.ready", **{k: v for k, v in ready.items() if k != "kind"})
        stop.wait()
    loop.join()
    for fault in faults:
        _LOG.critical("coordinator.failed", exc_info=fault)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
