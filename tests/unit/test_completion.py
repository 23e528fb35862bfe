"""Tab completion, typed into a real bash; zsh and fish where they are installed."""

import os
import pty
import select
import shutil
import time
from pathlib import Path

import pytest

from trainer import cli, completion, manual
from trainer.config import all_keys
from trainer.job import PHASES

ROOT = Path(__file__).resolve().parents[2]
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "deepspeed() { printf '<%s>' \"$@\"; echo END; }"),
    "zsh": (["zsh", "-f", "-i"], "deepspeed() { printf '<%s>' \"$@\"; echo END; }"),
    "fish": (["fish", "--no-config", "-i"], "function deepspeed; printf '<%s>' $argv; echo END; end"),
}


class Typed:
    """A shell at a terminal, to type into."""

    def __init__(self, shell: str, folder: Path):
        arguments, echo = SHELLS[shell]
        script = folder / f"completion.{shell}"
        script.write_text(completion.script(shell, cli.parser()))
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ |= {"TERM": "dumb", "HOME": str(folder), "PS1": "$ "}
            os.execvp(arguments[0], arguments)
        self.type(f"source {script}\n{echo}\necho REA''DY\n", until="READY")

    def type(self, keys: str, until: str, seconds: float = 20) -> str:
        """What the shell shows after these keys, up to a text."""
        os.write(self.terminal, keys.encode())
        shown, end = "", time.monotonic() + seconds
        while until not in shown:
            assert time.monotonic() < end, shown
            if select.select([self.terminal], [], [], 1)[0]:
                shown += os.read(self.terminal, 65536).decode(errors="replace")
        return shown

    def complete(self, line: str) -> list[str]:
        """The words of a command line in which every tab is the tab key."""
        shown = self.type(line + "\n", until="END")
        return shown[: shown.rindex("END")].splitlines()[-1].strip("<>").split("><")

    def close(self) -> None:
        os.close(self.terminal)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_line_typed_with_tabs(shell, tmp_path):
    if shell != "bash" and not shutil.which(shell):  # users have one; bash is always run
        pytest.skip(f"{shell} is not installed")
    typed = Typed(shell, tmp_path)
    try:
        line = "deepspeed trainer/run.py --ph\tmet\t --rec\trecipes/de\t student.moe.renor\tfa\t --ds\tds_configs/cp\t"
        assert typed.complete(line) == [
            "trainer/run.py", "--phase", "meta", "--recipe", "recipes/demo.yaml", "student.moe.renormalize=false",
            "--ds_config", "ds_configs/cpu_debug.json",
        ]  # fmt: skip
        assert typed.complete("deepspeed other.py --ph\t recipes/de\t")[1:] == ["--ph", "recipes/demo.yaml"]
    finally:
        typed.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_every_flag_phase_and_key_is_in_the_script(shell):
    script = completion.script(shell, cli.parser())
    prefix = "-l " if shell == "fish" else "--"
    flags = [
        flag for action in cli.parser()._actions if action.help != "==SUPPRESS==" for flag in action.option_strings
    ]
    for flag in flags:
        assert not flag.startswith("--") or prefix + flag[2:] in script
    words = set(script.replace("'", " ").split())
    assert {f"{key}=" for key in all_keys()} | set(PHASES) | set(manual.COMMANDS) <= words
    assert "local_rank" not in script


def test_another_shell():
    with pytest.raises(ValueError, match=r"there is no completion for zhs\. Did you mean zsh\?"):
        completion.script("zhs", cli.parser())
