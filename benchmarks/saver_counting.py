"""A saver that counts what it gets and stops after some layers, for benchmarks/scale.py.

It stops by raising, so the run ends as a failed one: what it counted is in `counted.json`.
"""

import json
import os
import time

takes_expert_slices = True


def add_arguments(parser):
    parser.add_argument("--count-layers", type=int, default=4)


def save_checkpoint(queue, args):
    queue.get()
    started, messages, total = time.perf_counter(), 0, 0
    while True:
        message = queue.get()
        if message == "done" or message["name"].startswith(f"transformer layer {args.count_layers}"):
            break
        messages += 1
        total += sum(tensor.nbytes for key, tensor in message.items() if key != "name")
    os.makedirs(args.save_dir, exist_ok=True)
    with open(os.path.join(args.save_dir, "counted.json"), "w") as file:
        json.dump({"messages": messages, "bytes": total, "seconds": time.perf_counter() - started}, file)
    if message != "done":
        raise SystemExit("counted enough")
