"""Train packs in one worker process of several: `pack_worker.py CASES.json`, with RANK, ... set.

A case: trials (numbers of pack_cases.SETTINGS), trial_facts and rung_rows_path, rungs, drop (rung
-> trials), stop_after (times that the runtime is asked), starved (the rank that has memory for one
part of a pass). Each worker leaves <output_dir>/<rank>.json.
"""

import json
import math
import sys
from pathlib import Path

import torch.distributed as dist
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conf.errors import CrossoverError
from conf.records import to_dict
from tests.training.pack_cases import Told, exact_norm, trial_job
from training import pack_model
from training.train_pack import train_pack

BACKWARD = pack_model.PackModel.backward


def starved(model, parts):
    """Memory for one part, and none for several."""
    if len(parts) > 1:
        BACKWARD(model, parts[:1])  # gradients that must be forgotten
        raise RuntimeError("DefaultCPUAllocator: not enough memory")
    return BACKWARD(model, parts)


def run(case):
    rank = dist.get_rank()
    told = Told(stop_after=case.get("stop_after", math.inf))
    told.global_rank = told.local_rank = rank
    told.world_size = dist.get_world_size()
    pack_model.PackModel.backward = starved if case.get("starved") == rank else BACKWARD
    jobs = [
        trial_job(number, output_dir=case["output_dir"], **case["trial_facts"])
        for number in case["trials"]
    ]

    def judge(pack, rung):
        for trial in case.get("drop", {}).get(str(rung), ()):
            if trial in pack.live:
                pack.drop(trial)

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
