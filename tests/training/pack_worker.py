"""Train packs in one worker process of several: `pack_worker.py CASES.json`, with RANK, ... set.

A case: trials (numbers of pack_cases.SETTINGS), trial_facts and rung_rows_path, rungs, drop (rung
-> trials), stop_after (times that the runtime is asked), starved (the rank that has memory for
memory_for parts of a pass, 1 if not told), full (the rank whose disk is). Each worker leaves
<output_dir>/<rank>.json.
"""

import json
import math
import sys
from pathlib import Path

import torch.distributed as dist
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conf.errors import CrossoverError
from conf.records import to_dict
from tests.training.pack_cases import Told, exact_norm, trial_job, with_memory_for
from training import pack, pack_model
from training.train_pack import train_pack

BACKWARD = pack_model.PackModel.backward
WRITE_STATE = pack.write_pack_state


def no_room(*args, **kwargs):
    raise OSError(28, "No space left on device")


def run(case):
    rank = dist.get_rank()
    told = Told(stop_after=case.get("stop_after", math.inf))
    told.global_rank = told.local_rank = rank
    told.world_size = dist.get_world_size()
    is_starved = case.get("starved") == rank
    parts = case.get("memory_for", 1)
    pack_model.PackModel.backward = with_memory_for(parts) if is_starved else BACKWARD
    pack.write_pack_state = no_room if case.get("full") == rank else WRITE_STATE
    jobs = [
        trial_job(number, output_dir=case["output_dir"], **case["trial_facts"])
        for number in case["trials"]
    ]

    def judge(trials, rung):
        for trial in case.get("drop", {}).get(str(rung), ()):
            if trial in trials.live:
                trials.drop(trial)

    found = {"output_dir": case["output_dir"]}
    try:
        outcomes = train_pack(
            jobs,
            told,
            rung_rows_path=Path(case["rung_rows_path"]),
            rungs=case.get("rungs", ()),
            judge=judge,
        )
        found["outcomes"] = {outcome.trial: to_dict(outcome) for outcome in outcomes}
    except CrossoverError as error:
        found["error"] = [type(error).__name__, str(error)]
    found["records"] = list(map(to_dict, told.records))
    found["notes"] = [note.note for note in told.notes]
    Path(case["output_dir"]).mkdir(parents=True, exist_ok=True)
    (Path(case["output_dir"]) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    LlamaRMSNorm.forward = exact_norm
    dist.init_process_group("gloo")
    for one in json.loads(Path(sys.argv[1]).read_text()):
        run(one)
    dist.destroy_process_group()
