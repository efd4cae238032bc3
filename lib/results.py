"""
Results of stages: JSON files that remember their settings, what they were made of, and the code behind them.

Training is protected: other settings ask for --name or --overwrite. An analysis always runs; what it replaces
is kept in earlier/, under its date. Killed anywhere, the same command goes on.
"""
import contextlib
import datetime
import errno
import functools
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import filelock

from lib import ranks
from lib.code import code_of
from lib.devices import describe_machine
from lib.files import Refused, checksum, file_metadata, read_json, remove_leftovers, short, write_json

WHOLE = ""  # the one row of a result that is not made row by row


class Result:
    """One JSON file of a stage: whole, or filled row by row, also by several processes.

    path        the file
    config      every setting that changes the numbers
    inputs      what it is made of: fingerprints, or with `key` {row: fingerprints of what it is made of}
    key         where the rows are, "tasks" or "pairs"; None for a result that is made as a whole
    files       function of a row's name: the pictures, arrays and weights that are set aside with it
    weights     function of a row's name: the safetensors files without which it is not made; their
                fingerprints stand in the row
    protected   refuse other settings, and rows of another script beside old ones, unless --overwrite is given
    named       whether the stage takes --name

    values      what stands in the file, for the stage to add to
    todo        the rows that are to be made, or [WHOLE]; empty: nothing to do, which has been said
    """

    def __init__(self, path, config, inputs, script, device, overwrite, key=None,
                 files=lambda row: [], weights=lambda row: [], protected=False, named=False):
        self.path, self.key, self.overwrite, self.protected = path, key, overwrite, protected
        self.config = jsonable(config if key else config | inputs)
        self.inputs = jsonable(inputs) if key else {WHOLE: {}}
        self.files, self.weights = files, weights
        self.stage = Path(script).stem
        self.beside = "--name NEW" if named else "another --runs"
        self.aside = None                    # the folder in earlier/ that takes what this run replaces
        self.code = code_of(Path(script))
        self.version = checksum(self.code)[:12]            # a result's code, in short
        self.provenance = provenance(device)
        if ranks.rank() == 0:
            # in one order, so that no two processes wait for each other
            self.claims = [claim(path, self.row_name(row)) for row in sorted(self.inputs)]
        ranks.wait()
        there = self.on_disk()
        self.search_before = there.get("search")
        differ = self.other_settings(there)
        self.values = {} if differ else there
        self.check_inputs()
        older = [row for row in self.rows
                 if self.made_by(row) != self.version and (protected or row in self.inputs)]
        self.todo = [row for row in self.inputs if overwrite or not self.is_made(row)]
        self.say(there, differ, older)
        if overwrite:
            self.start_anew()
        elif not key and self.todo:
            self.values = {}
        for row in self.inputs:
            if row not in self.todo:
                self.forget(row)                           # killed between its last two writes

    def on_disk(self):
        """The result as it stands on disk, {} where it does not; --overwrite takes a damaged one for none."""
        if self.overwrite and self.path.exists():
            try:
                return read_json(self.path, "the same command")
            except Refused as refusal:
                print(f"{self.stage}: {refusal}; it is overwritten", flush=True)
                return {}
        return read_json(self.path, "the same command") if self.path.exists() else {}

    def other_settings(self, there):
        """How what is on disk differs in its settings, in words; Refused where it is protected."""
        if self.protected and not self.overwrite:
            refuse_other_settings(self.path, there, self.config, self.beside)
        return differences(there["config"], self.config) if there else []

    @property
    def rows(self):
        """{row: its values}; of a result without rows, itself where it is there."""
        if self.key:
            return self.values.setdefault(self.key, {})
        return {WHOLE: self.values} if self.values else {}

    def check_inputs(self):
        """Refused where a protected row was made of something else than is there now."""
        for row, inputs in self.inputs.items():
            made_of = self.rows[row].get("made_of", inputs) if row in self.rows else inputs
            if self.protected and not self.overwrite and made_of != inputs:
                raise Refused(f"{self.path}: {row} was made of other inputs "
                              f"({'; '.join(differences(made_of, inputs))}): "
                              f"give {self.beside} to keep both, or --overwrite to replace it")

    def made_by(self, row):
        """The version of the code that made a row."""
        return self.rows[row].get("version")

    def is_made(self, row):
        """Whether a row is there, its files as written, of the same inputs (an analysis: and same code)."""
        values = self.rows.get(row)
        if values is None or values.get("made_of", {}) != self.inputs[row]:
            return False
        if not self.protected and self.made_by(row) != self.version:
            return False
        return values.get("weights_sha256", []) == self.fingerprints(row)

    def fingerprints(self, row):
        """The SHA-256 of a row's weights as they are on disk, None for a file that is not there."""
        found = []
        for path in self.weights(row):
            found.append(file_metadata(path, "the same command")["sha256"] if path.exists() else None)
        return found

    def say(self, there, differ, older):
        """Say what is skipped, what is made anew and why, and what has changed since."""
        changed = self.changed_files(there, older)
        if self.overwrite or not there:
            return
        if self.protected and older and f"{self.stage}.py" not in self.makers(there, older):
            makers = " and ".join(self.makers(there, older)) or "an older version of this study"
            raise Refused(f"{self.path} was made by {makers}, not by {self.stage}.py: "
                          f"give {self.beside} to put yours beside it, or --overwrite to replace it")
        if self.protected and older:
            remedy = (f'"{self.provenance["command"]} --overwrite" makes it again with today\'s, '
                      f"{self.beside} puts another beside it")
            if self.todo and f"{self.stage}.py" in changed:
                raise Refused(f"{self.path} was made before {', '.join(changed)} changed, and "
                              f"{', '.join(self.todo)} would stand beside it: {remedy}")
            print(f"{self.stage}: {self.path} was made before {', '.join(changed)} changed: {remedy}",
                  flush=True)
        elif not self.todo:
            what = f" has all {len(self.inputs)} {self.key}" if self.key else " is there"
            print(f"{self.stage}: {self.path}{what}, nothing to do (--overwrite to redo)", flush=True)
        elif differ or older:
            why = "; ".join(differ) or f"{', '.join(changed)} changed since"
            print(f"{self.stage}: {self.path} is made anew ({why}); "
                  f"what it replaces is kept in {self.earlier}/", flush=True)

    def makers(self, there, rows):
        """The scripts that made some rows."""
        files = set()
        for row in rows:
            files |= set(there.get("code", {}).get(self.made_by(row), ()))
        return sorted(file for file in files if "/" not in file and file != "common.py")

    def changed_files(self, there, rows):
        """The files whose code is not that which made some rows."""
        changed = set()
        for row in rows:
            before = there.get("code", {}).get(self.made_by(row), {})
            changed |= {file for file in before | self.code if before.get(file) != self.code.get(file)}
        return sorted(changed)

    def start_anew(self):
        """Forget what --overwrite replaces: the rows asked for, those of other code, and where no row stays
        what they share."""
        kept = {}
        for row, values in self.rows.items():
            if row not in self.inputs and values.get("version") == self.version:
                kept[row] = values
        self.values = self.values | {self.key: kept} if kept else {}
        for row in self.todo:
            self.forget(row)

    def take_rows(self, there):
        """Of the rows on disk all but those that are made here, which only this process has as they are."""
        on_disk = there.get(self.key, {}) if there.get("config") == self.config else {}
        mine = {row: values for row, values in self.rows.items() if row in self.todo}
        rows = {}
        for row, values in (on_disk | mine).items():
            kept = not self.overwrite or values.get("version") == self.version
            if row in mine or (kept and row not in self.todo):
                rows[row] = values
        self.values[self.key] = rows

    @contextlib.contextmanager
    def saving(self, row=WHOLE):
        """Around writing a row's files and values: what they replace is set aside, the JSON comes last.

        Other rows are left as they are on disk. Of torchrun's processes rank 0 writes.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path) if ranks.rank() == 0 else contextlib.nullcontext():
            there = self.on_disk()
            self.other_settings(there)                     # those of a process that began at the same time
            if not self.protected and ranks.rank() == 0:
                self.drop(there, row) if self.overwrite else self.set_aside(there, row)
            if self.key:
                self.take_rows(there)
            yield
            if row in self.rows or not self.key:
                about = {"version": self.version, "made_of": self.inputs[row],
                         "weights_sha256": self.fingerprints(row)}
                (self.rows[row] if self.key else self.values).update(about)
            code = there.get("code", {}) if self.key and there.get("config") == self.config else {}
            self.values |= {"config": self.config, "code": code | {self.version: self.code},
                            **self.provenance}
            write_json(self.path, self.values)
        self.forget(row)

    def drop(self, there, row):
        """Take what --overwrite replaces out of the file before its pictures and arrays are others."""
        if self.key and there.get("config") == self.config:
            rest = {other: values for other, values in there[self.key].items() if other != row}
            write_json(self.path, there | {self.key: rest})
        else:
            self.path.unlink(missing_ok=True)

    @property
    def earlier(self):
        return self.path.parent / "earlier"

    def set_aside(self, there, row):
        """Move what a row replaces, or all of a result of other settings, to earlier/NAME-DATE/.

        The JSON goes along.
        """
        other = there and (there["config"] != self.config or not self.key)
        if not there or not (other or row in there[self.key]):
            return
        if not self.aside:
            made = datetime.datetime.fromtimestamp(self.path.stat().st_mtime)
            same = len(list(self.earlier.glob(f"{self.path.stem}-{made:%Y-%m-%dT%H-%M-%S}*")))
            number = f"-{same + 1}" if same else ""
            self.aside = self.earlier / f"{self.path.stem}-{made:%Y-%m-%dT%H-%M-%S}{number}"
            self.aside.mkdir(parents=True)
        for name in there[self.key] if other and self.key else [row]:
            for file in self.files(name):
                if file.exists():
                    target = self.aside / file.relative_to(self.path.parent)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)
        if other:
            os.replace(self.path, self.aside / self.path.name)
        elif not (self.aside / self.path.name).exists():
            shutil.copy2(self.path, self.aside / self.path.name)

    # ---------------------------------------------------- a learning rate that all rows share

    def search_begins(self):
        """Whether a learning rate has to be searched, once no other process searches; then none does.

        What another process has found since this one began is taken.
        """
        if ranks.rank() == 0:
            self.search = claim(self.path, f"{self.path.stem}.search")
        ranks.wait()
        there = self.on_disk()
        if not self.other_settings(there) and there.get("search") != self.search_before:
            self.values |= {key: there[key] for key in ("search", "lr") if key in there}
        if "lr" in self.values:
            self.release_search()
        return "lr" not in self.values

    def search_ends(self):
        """Write what was found, for this process and those that wait for it."""
        with self.saving():
            pass
        self.release_search()

    def release_search(self):
        if ranks.rank() == 0 and self.search:
            self.search.release()

    # ---------------------------------------------------- half-done rows

    def state_path(self, row):
        return self.path.parent / "state" / f"{self.row_name(row)}.json"

    def row_name(self, row):
        return f"{self.path.stem}-{row}" if row else self.path.stem

    def state(self, row=WHOLE):
        """What a killed run of the same settings, inputs and code left of a row: a dict, empty if nothing."""
        path = self.state_path(row)
        there = read_json(path, "the same command") if path.exists() and not self.overwrite else {}
        [there, *_] = ranks.gather(there)                  # all go on from what rank 0 has found
        same = (there and there["config"] == self.config
                and there["made_of"] == [self.version, self.inputs[row]])
        return there["state"] if same else {}

    def keep(self, state, row=WHOLE):
        """Write the state of a half-done row, JSON values."""
        about = {"config": self.config, "made_of": [self.version, self.inputs[row]]}
        write_json(self.state_path(row), about | {"state": state} | self.provenance)

    def training_state(self, row, checksum):
        """Where a training keeps the state of a row, for forget to find."""
        return self.state_path(row).with_name(f"{self.row_name(row)}-{checksum[:10]}.state")

    def forget(self, row):
        """Remove the states of a row that is finished."""
        if ranks.rank() == 0:
            of_training = self.training_state(row, "?" * 10)    # not those of a row named ROW-MORE
            for path in (self.state_path(row), *of_training.parent.glob(of_training.name)):
                path.unlink(missing_ok=True)
            for path in (self.state_path(row), of_training):    # of a kill, perhaps under other settings
                remove_leftovers(path)


def refuse_other_settings(path, there, config, beside):
    """Refused where a protected result is there under other settings; `beside` is the flag for both."""
    differ = differences(there["config"], config) if there else []
    if differ:
        raise Refused(f"{path} holds a result of other settings ({'; '.join(differ)}): "
                      f"give {beside} to keep both, or --overwrite to replace it")


def differences(there, asked):
    """What differs between two configs, in words."""
    differ = []
    for key in there | asked:
        found, wanted = there.get(key), asked.get(key)
        if isinstance(found, dict) and isinstance(wanted, dict):
            differ += [f"{key} of {name}" for name in found | wanted if found.get(name) != wanted.get(name)]
        elif found != wanted:
            differ.append(f"{key} {short(found)} there, {short(wanted)} asked")
    return differ


def jsonable(values):
    return json.loads(json.dumps(values))


def provenance(device):
    """How and where a number was made: {"command", "machine": device, threads, versions, date (UTC)}."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "machine": describe_machine(device) | {"date": date}}


# --------------------------------------------------------------------------------------- locks


def claim(path, name):
    """Wait until no other process holds a name beside `path`, then hold it until the lock is released.

    The system takes the lock back from a process however it ends. None, with a warning, on a file system
    without locks.
    """
    lock_path = path.parent / "state" / f"{name}.lock"
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(lock_path, fallback_to_soft=False)
    try:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            print(f"{path}: another process is at work on it, waiting until that ends", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        no_locks = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
        if isinstance(error, OSError) and error.errno not in no_locks:
            raise
        warn_once(f"warning: {path.parent} is on a file system without locks ({error}): let no two processes "
                  f"write the same result")
        return None
    return lock


@functools.cache
def warn_once(message):
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path):
    """Hold the lock on one result file while it is read and written."""
    lock = claim(path, f"{path.stem}.json")
    try:
        yield
    finally:
        if lock:
            lock.release()
