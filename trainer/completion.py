"""Tab completion for bash, zsh and fish: flags, phases, files, section.key= names and the values a key can have.

    source <(python trainer/run.py --completion bash)

The command of a run is `deepspeed`, `torchrun` or `python`, so the scripts hook onto those words and stay quiet (file
names, as before) unless trainer/run.py stands on the line.
"""

from __future__ import annotations

import argparse

from trainer import manual
from trainer.config import close
from trainer.ds_config import PASSED_ON, SECTIONS, TRAINER_KEYS
from trainer.job import PHASES

PROGRAMS = ("run.py", "trainer/run.py", "deepspeed", "torchrun", "python", "python3")
FILES = {"--recipe": "yaml", "--config": "yaml", "--ds_config": "json"}  # flag -> ending


def script(shell: str, flags: argparse.ArgumentParser) -> str:
    """The script to source.

    Raises:
        ValueError: another shell than bash, zsh and fish.
    """
    if shell not in _SHELLS:
        raise ValueError(f"there is no completion for {shell}. {close(shell, list(_SHELLS))}")
    return _SHELLS[shell](flags)


def names() -> list[str]:
    """What can stand before the value of an override: train.lr=, ds.trainer.ep_size=, ds.bf16. (a section)."""
    ours = [f"{key.name}=" for section in manual.sections() for key in manual.keys(section)]
    theirs = [f"ds.{key}{'.' if key in SECTIONS else '='}" for key in PASSED_ON]
    return [*ours, *theirs, *(f"ds.trainer.{key}=" for key in TRAINER_KEYS)]


def values() -> dict[str, list[str]]:
    """Key -> what it can be, for keys with a short list of values."""
    found = {}
    for section in manual.sections():
        for key in manual.keys(section):
            if key.type == "true or false":
                found[key.name] = ["true", "false"]
            elif key.type.startswith("one of "):
                found[key.name] = key.type.removeprefix("one of ").split(", ")
    return found


def _flags(flags: argparse.ArgumentParser) -> list[tuple[str, str, list[str]]]:
    """(flag, help, words it takes) of every flag users see."""
    words = {"--phase": list(PHASES), "--module": ["all"], "--expert": ["all"], "--completion": list(_SHELLS),
             "--help": [*manual.sections(), manual.DS, "all"]}  # fmt: skip
    shown = [action for action in flags._actions if action.help != argparse.SUPPRESS]
    return [(flag, action.help or "", words.get(flag, [])) for action in shown for flag in action.option_strings
            if flag.startswith("--")]  # fmt: skip


def _bash(flags: argparse.ArgumentParser) -> str:
    cases = [f"        {flag}) found='{' '.join(words)}' ;;" for flag, _, words in _flags(flags) if words]
    files = [f"        {flag}) ending={ending} ;;" for flag, ending in FILES.items()]
    known = [f"        {key}) found='{' '.join(words)}' ;;" for key, words in values().items()]
    listed = "\n".join
    return f"""# tab completion of trainer/run.py for bash; made by trainer/run.py --completion bash
_m2mkd() {{
    local line=${{COMP_LINE:0:COMP_POINT}} word flag found='' ending='' IFS=$' \\t\\n'
    local -a before
    COMPREPLY=()
    [[ $line == *run.py* ]] || return 0
    word=${{line##*[[:space:]]}}
    read -ra before <<< "${{line%"$word"}}"
    flag=${{before[${{#before[@]}} - 1]}}
    if [[ $word == --*=* ]]; then flag=${{word%%=*}} word=${{word#*=}}; fi
    case $flag in
{listed(cases)}
{listed(files)}
        --out) ending=/ ;;
        {"|".join(manual.COMMANDS)}) return 0 ;;
    esac
    if [[ $ending ]]; then
        compopt -o filenames
        IFS=$'\\n'
        COMPREPLY=($(compgen -d -- "$word"))
        if [[ $ending != / ]]; then COMPREPLY+=($(compgen -f -X "!*.$ending" -- "$word")); fi
    elif [[ $found ]]; then
        COMPREPLY=($(compgen -W "$found" -- "$word"))
    elif [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W '{" ".join(flag for flag, *_ in _flags(flags))}' -- "$word"))
    elif [[ $word == *=* ]]; then
        case ${{word%%=*}} in
{listed(known)}
        esac
        COMPREPLY=($(compgen -W "$found" -- "${{word#*=}}"))
        if [[ $COMP_WORDBREAKS != *=* ]]; then COMPREPLY=("${{COMPREPLY[@]/#/${{word%%=*}}=}}"); fi
    else
        COMPREPLY=($(compgen -W '{" ".join([*names(), *manual.COMMANDS])}' -- "$word"))
        if [[ ${{COMPREPLY[0]}} == *[=.] ]]; then compopt -o nospace; fi
    fi
}}
complete -o bashdefault -o default -F _m2mkd {" ".join(PROGRAMS)}
"""


def _zsh(flags: argparse.ArgumentParser) -> str:
    cases = [f"        {flag}) compadd -- {' '.join(words)}; return ;;" for flag, _, words in _flags(flags) if words]
    files = [f"        {flag}) _files -g '*.{ending}'; return ;;" for flag, ending in FILES.items()]
    known = [f"        {key}=*) compset -P '*='; compadd -- {' '.join(words)} ;;" for key, words in values().items()]
    listed = "\n".join
    return f"""# tab completion of trainer/run.py for zsh; made by trainer/run.py --completion zsh
_m2mkd() {{
    if [[ "$words" != *run.py* ]]; then _default; return; fi
    case ${{words[CURRENT-1]}} in
{listed(cases)}
{listed(files)}
        --out) _files -/; return ;;
        {"|".join(manual.COMMANDS)}) _files; return ;;
    esac
    case ${{words[CURRENT]}} in
        -*) compadd -- {" ".join(flag for flag, *_ in _flags(flags))} ;;
{listed(known)}
        *) compadd -S '' -- {" ".join(names())}; compadd -- {" ".join(manual.COMMANDS)} ;;
    esac
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
compdef _m2mkd {" ".join(PROGRAMS)}
"""


def _fish(flags: argparse.ArgumentParser) -> str:
    lines = []
    for flag, text, words in _flags(flags):
        takes = f" -x -a '{' '.join(words)}'" if words else ""
        if flag in FILES:
            takes = f" -x -a '(__fish_complete_suffix .{FILES[flag]})'"
        elif flag == "--out":
            takes = " -x -a '(__fish_complete_directories)'"
        quoted = text.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"    complete -c $program -n __m2mkd -l {flag[2:]}{takes} -d '{quoted}'")
    known = [f"{key}={word}" for key, words in values().items() for word in words]
    return f"""# tab completion of trainer/run.py for fish; made by trainer/run.py --completion fish
function __m2mkd
    string match -q '*run.py*' -- (commandline -opc | string join ' ')
end
for program in {" ".join(PROGRAMS)}
{chr(10).join(lines)}
    complete -c $program -n __m2mkd -a '{" ".join([*manual.COMMANDS, *names(), *known])}'
end
"""


_SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
