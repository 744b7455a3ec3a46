"""What plugins written for Megatron-LM's convert.py and for Megatron-LLM's checkpoint_util.py have in common: text.

The stand-ins of tests/plugins and tests/epfl are modules of these pieces, which stand as upstream's saver_base.py and
checkpoint_saver_megatron.py have them.
"""

from __future__ import annotations

#: Of a loader: an exception goes on, after the saver was told.
LOAD = '''
def load_checkpoint(queue, args):
    try:
        _load_checkpoint(queue, args)
    except:
        queue.put("exit")
        raise
'''

#: In _load_checkpoint.
QUEUE_PUT = '''
    def queue_put(name, msg):
        msg["name"] = name
        queue.put(msg)
'''

#: In save_checkpoint.
QUEUE_GET = '''
    def queue_get(name=None):
        val = queue.get()
        if val == "exit":
            print("Loader exited, exiting saver")
            exit(1)
        if name is not None and args.checking and val["name"] != name:
            val_name = val["name"]
            print(f'Unexpected message. Expecting "{name}" but got "{val_name}". Exiting saver.')
            exit(1)
        return val

    def check_message(msg):
        if not args.checking:
            return
        msg_name = msg.pop("name")
        if len(msg.keys()) > 0:
            print(f"Unexpected values in {msg_name}: {list(msg)}")
            exit(1)
'''

#: The end of save_checkpoint.
DONE = '''
    msg = queue_get()
    if msg != "done":
        print("ERROR: got some more data but was expecting to be done")
        exit(1)
    os.makedirs(args.save_dir)
    torch.save(seen, args.save_dir + "/seen.pt")
'''
