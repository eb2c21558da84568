"""support/distributed.py: devices, and two processes that do together what one does alone."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from conftest import ROOT
from model import read
from support import distributed
from test_train import near, same_run, signal_after, tensors

ARGV = """--method autolora --rank 4 --data infer --eval_rows 20 --batch_size 8 --device cpu
    --lr 1e-2 --search_steps 3 --steps 5 --eval_every 4
    --hypergrad exact --eta 0.5 --beta_lr 0.1""".split()
IN_PARTS = [*ARGV, "--grad_accum", "2"]


def torchrun(folder, script, *argv):
    """Run a script in two processes. Returns its exit status and what it printed."""
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, script, *argv], cwd=folder, text=True, env=environment,
                          stdout=subprocess.PIPE) as run:
        try:
            printed, _ = run.communicate(timeout=100)
        finally:
            run.terminate()             # if it hangs: torchrun then ends its two processes, too
    return run.returncode, printed


def in_each_process():
    """What each of two processes does when torchrun runs this file."""
    distributed.start_processes(torch.device("cpu"))
    index = distributed.process_index()
    sums = [torch.tensor([1.0, 10.0]) * (index + 1), torch.tensor(index)]
    returned = distributed.all_reduce_sum(sums)
    distributed.print0("printed once")
    found = {"sums": sums, "returned": returned, "share": distributed.share([0, 1, 2, 3, 4]),
             "count": distributed.process_count(), "main": distributed.is_main_process()}
    torch.save(found, f"process-{index}.pt")

    distributed.start_processes = lambda device: device     # they have been started
    train.main(IN_PARTS)
    call = 2 if index == 1 else None                        # only process 1 receives a signal
    with signal_after(signal.SIGINT, torch.optim.AdamW, "step", call):
        with pytest.raises(KeyboardInterrupt) as e:
            train.main([*IN_PARTS, "--out", "a.pt"])
    print(f"process {index} received signal {e.value.args[0]:d}", flush=True)
    torch.distributed.barrier()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if index == 0:
        train.evaluate = ctrl_c
    train.main(["--resume", "a.pt"])


def ctrl_c(*_):
    """An evaluation during which somebody presses Ctrl-C: torchrun signals its processes."""
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which two processes ran `in_each_process`; `printed` is their output."""
    folder = tmp_path_factory.mktemp("two")
    _, printed = torchrun(folder, __file__)
    (folder / "printed").write_text(printed)
    return folder


def test_one_process_needs_no_process_group():
    t = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce_sum([t]) is None and t.tolist() == [1, 2]
    assert distributed.share([3, 4]) == [3, 4] and distributed.process_count() == 1
    assert distributed.process_index() == 0 and distributed.is_main_process()


def test_the_dtype_of_activations():
    cpu = torch.device("cpu")
    x = torch.ones(2, 2)
    for name, chosen, dtype in [(None, "fp32", torch.float32), ("bf16", "bf16", torch.bfloat16)]:
        assert distributed.pick_dtype(name, cpu) == chosen
        with distributed.autocast(chosen, cpu):
            assert (x @ x).dtype == dtype


def test_sums_are_in_place_and_only_the_main_process_prints(folder):
    for index in (0, 1):
        found = read(folder / f"process-{index}.pt")
        assert [t.tolist() for t in found["sums"]] == [[3, 30], 1] and found["returned"] is None
        assert found["share"] == ([0, 2, 4], [1, 3])[index]
        assert found["count"] == 2 and found["main"] == (index == 0)
    assert (folder / "printed").read_text().count("printed once") == 1


def test_two_processes_with_two_parts_each_train_as_one(folder):
    train.main([*ARGV, "--out", str(folder / "one.pt")])
    one = read(folder / "one.pt")
    two = read(folder / "out" / "autolora.pt")
    for key in ("loss", "norm"):
        assert two["history"][key] == pytest.approx(one["history"][key], rel=1e-3)
    assert near(two["history"]["beta"][-1][1], one["history"]["beta"][-1][1], 0.01)
    for key in ("before", "after"):
        assert two[key]["infer"] == pytest.approx(one[key]["infer"], rel=1e-4)
        assert 0 < one[key]["infer"]["exact"] < 1               # a wrong count would be noticed
    one = tensors(folder / "one.pt")
    two = tensors(folder / "out" / "autolora.pt")
    assert all(near(two[name], one[name], 0.01) for name in one)


def test_two_processes_stop_together_and_are_resumed(folder):
    """First process 1 received a signal, then Ctrl-C was pressed."""
    printed = (folder / "printed").read_text()
    assert "process 0 received signal 15" in printed            # process 1 told it
    assert "process 1 received signal 2" in printed
    assert printed.count("saved; to continue: python train.py --resume a.pt") == 2
    assert "resumed  after search step 2" in printed
    status, printed = torchrun(folder, ROOT / "train.py", "--resume", "a.pt")
    assert "resumed  after train step 4" in printed and status == 0
    assert same_run(folder / "a.pt", folder / "out" / "autolora.pt")


if __name__ == "__main__":
    in_each_process()
