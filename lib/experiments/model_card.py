"""The card of an exported model: README.md with a header for the Hub, each line from the record of the run.

    model_card(CardFacts(about, "20261122_101500_quickstart", manifest, held="float32", stored="bfloat16"))

What the record does not say is not said: a checkpoint by itself has no accuracy, and nothing here has a licence.
Header: https://huggingface.co/docs/hub/model-cards. What others wrote is text: inline or fenced, never markup.
"""

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lib.config import Config, build, to_yaml
from lib.data.renderer import RECIPES
from lib.experiments.markdown import fenced, inline, table
from lib.model.released import is_from_scratch

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")

USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one, or its name on the Hub
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
question = [{"role": "user", "content": "…"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""


USE_ADAPTERS = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("…")  # what these adapters were trained beside, named below
model = PeftModel.from_pretrained(base, ".")  # this folder, or its name on the Hub
```"""


class CardFacts(NamedTuple):
    """What is known: `model.json`, name and manifest of the run, the dtype of the weights there and here; and
    whether adapters are all that is here."""

    about: dict[str, Any]
    run: str
    manifest: dict[str, Any] | None
    held: str
    stored: str
    adapters: bool = False


def model_card(facts: CardFacts) -> str:
    manifest = facts.manifest or {}
    sections = [
        _header(facts.about["base"], facts.adapters),
        f"# {inline(facts.run or _base(facts.about['base']) + ', tuned')}",
        *_result(manifest),
        "## Use",
        USE_ADAPTERS if facts.adapters else USE,
        *_instruction(facts.about.get("system_instruction", "")),
        "## Training",
        _facts(_training(facts.about, manifest)),
        "## Record",
        _facts(_record(facts)),
        *_reproduce(facts.run, manifest),
        "## Licence",
        _licence(facts.about["base"]),
    ]
    return "\n\n".join(sections) + "\n"


def hub_name(base: str) -> str:
    """The name of the base on the Hub, or nothing where it is none: made from scratch, or a folder."""
    return base if HUB_NAME.fullmatch(base) and not Path(base).is_dir() else ""


def _header(base: str, adapters: bool) -> str:
    fields = {"library_name": "peft" if adapters else "transformers", "pipeline_tag": "text-generation"}
    fields |= {"base_model": hub_name(base)} if hub_name(base) else {}
    fields |= {"tags": ["sft", "reasoning-traces", "retrace"]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _base(base: str) -> str:
    """The base as a reader elsewhere may know it: of a folder the last name alone, not the path on one machine."""
    if is_from_scratch(base):
        return f"{base}, made from scratch"
    return hub_name(base) or Path(base).name


def _result(manifest: dict[str, Any]) -> list[str]:
    found = (manifest.get("metrics") or {}).get("evaluation")
    if not found:
        return ["No evaluation is recorded of this model."]
    sides, confidence = (found["before"], found["after"]), f"{100 * (1 - found['rule']['alpha']):g} %"
    low, high = found["difference_interval"]
    rows = [
        ["items", found["n"], found["n"]],
        [f"accuracy ({confidence} interval)", *map(_accuracy, sides)],
        *[[name, *(side[name] for side in sides)] for name in ("correct", "wrong", "unscored", "truncated")],
        ["all steps true", *map(_sound, sides)],
        ["right answer, wrong reasoning", *map(_unsound, sides)],
    ]
    return [
        f"**{inline(found['sentence'])}**",
        "## Evaluation",
        f"Eval set {inline(found['eval_set'])}, the same items before and after training.",
        table(["", "before", "after"], rows),
        f"Paired difference {100 * found['difference']:+.1f} points ({confidence} interval {100 * low:+.1f} to "
        f"{100 * high:+.1f}); {found['fixed']} fixed, {found['broken']} broken; p = "
        f"{found['p_value']:.3g}. {_leaks(found['leaks'])} Rule, set before the run: a change is called "
        f"one where p < {found['rule']['alpha']:g} and accuracy changes by {100 * found['rule']['min_effect']:.1f} "
        "points or more, and improved only where a constant answer is beaten, too.",
    ]


def _accuracy(side: dict[str, Any]) -> str:
    low, high = side["interval"]
    return f"{100 * side['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _sound(side: dict[str, Any]) -> str:
    return f"{side['all_steps_correct']} of {side['steps_checked']}" if side["steps_checked"] else "not checkable"


def _unsound(side: dict[str, Any]) -> str:
    return str(side["right_answer_wrong_reasoning"]) if side["steps_checked"] else "not checkable"


def _leaks(leaks: list[dict[str, Any]] | None) -> str:
    if leaks is None:
        return "Leaks of items into the training data were not looked for."
    return f"Of the items, {len({leak['item'] for leak in leaks})} are asked in the training data."


def _instruction(instruction: str) -> list[str]:
    said = "The chat template is the one of training, and `generate` ends an answer where ours does, greedily."
    if not instruction:
        return [said]
    return [
        f"{said} Every prompt of training began with this instruction; the template puts it before a chat that has "
        "no system message of its own:",
        fenced(instruction),
    ]


def _training(about: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    settings, done = about.get("inputs", {}).get("training", {}), about.get("training", {})
    recipe = manifest.get("recipe")
    return {
        "base": _base(about["base"]),
        "recipe": f"{recipe}: {RECIPES.get(recipe, '')}" if recipe else None,
        "examples trained on": done.get("examples"),
        "examples held out": done.get("held_out"),
        "steps": done.get("steps"),
        "peak learning rate": settings.get("learning_rate"),
        "other settings": ", ".join(
            f"{name} {value}" for name, value in settings.items() if name not in ("learning_rate", "num_steps")
        ),
        "loss, last logged": done.get("loss"),
        "held-out loss, last logged": done.get("held_out_loss"),
    }


def _record(facts: CardFacts) -> dict[str, Any]:
    about, manifest = facts.about, facts.manifest or {}
    inputs = manifest.get("inputs", {})
    dataset, eval_set, data = (inputs.get(name) or {} for name in ("dataset", "eval_set", "data"))
    return {
        "run": facts.run,
        "run id": manifest.get("run_id"),
        "status": manifest.get("status"),
        "error": manifest.get("error"),
        "begun": manifest.get("created_at"),
        "finished": manifest.get("finished_at"),
        "dataset": dataset.get("key"),
        "dataset sha256": dataset.get("content_sha256"),
        "training file": data.get("file"),
        "training file sha256": data.get("sha256"),
        "examples sha256": about.get("inputs", {}).get("examples_sha256"),
        "eval set": eval_set.get("name"),
        "eval set sha256": eval_set.get("sha256"),
        "base weights sha256": about.get("inputs", {}).get("base_weights_sha256"),
        "weights sha256": about["weights_sha256"],
        "numbers in these files": _numbers(facts),
        "tokenizer sha256": about["tokenizer_file_sha256"],
        "commit": _commit(manifest),
        "fingerprint": ", ".join(f"{name} {value}" for name, value in about.get("fingerprint", {}).items() if value),
    }


def _numbers(facts: CardFacts) -> str:
    """Their dtype, and whether it is narrower than what the model was trained and evaluated with."""
    if facts.stored == "float32":
        return facts.stored
    if facts.held != facts.stored:
        return f"{facts.stored}, rounded from the {facts.held} that everything here was found with"
    if "lora" in facts.about:
        return f"{facts.stored}, rounded as the adapters were merged; everything here was found with them beside it"
    return facts.stored


def _commit(manifest: dict[str, Any]) -> str | None:
    if not manifest.get("git_sha"):
        return "not recorded" if manifest else None
    patch = f", with uncommitted changes of sha256 {manifest.get('git_patch_sha256')}"
    return f"{manifest['git_sha']}{patch if manifest['git_dirty'] else ''}"


def _reproduce(run: str, manifest: dict[str, Any]) -> list[str]:
    if not manifest:
        return []
    data = manifest["inputs"].get("data")
    from_nothing = "python -m lib run config.yaml"
    if data:
        from_nothing = f"python -m lib train --config config.yaml --data {shlex.quote(data['file'])} --output again"
    needed = "" if data or manifest["config"]["traces"]["game"] else " Its traces were imported, and must be there too."
    return [
        "## Reproduce",
        f"In a checkout of the commit above, with the configuration below as config.yaml.{needed}",
        fenced(from_nothing),
        *([] if data else ["Where the run itself is, every result is compared bit for bit by", _compared(run)]),
        fenced(to_yaml(build(Config, manifest["config"], "run_manifest.json: config")).rstrip()),
    ]


def _compared(run: str) -> str:
    return fenced(f"python -m lib runs reproduce {shlex.quote(run)}")


def _licence(base: str) -> str:
    terms = "" if is_from_scratch(base) else " What is tuned from released weights stays under their terms."
    return f"None is recorded, so this card names none.{terms}"


def _facts(values: dict[str, Any]) -> str:
    """A table of what is known."""
    rows = [[name, inline(str(value))] for name, value in values.items() if value not in (None, "")]
    return table(["", ""], rows)
