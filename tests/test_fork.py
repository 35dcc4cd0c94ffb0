"""What docs/troubleshooting.md says of forked children."""

import pytest
from inductor_vision.tests.support.compiled import run_python

FORK = """
import os, signal, sys, time
import torch
import inductor_vision

torch.set_num_threads(2)
boxes, numbers = torch.rand(5, 4), torch.rand(1 << 16)

def program(boxes, numbers):
    rotated = boxes[:, [0, 1, 2, 3, 0]]
    return inductor_vision.box_iou_rotated(rotated, rotated), (numbers * numbers).sum()

compiled = torch.compile(program)
torch.testing.assert_close(compiled(boxes, numbers), program(boxes, numbers))
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    torch.testing.assert_close(compiled(boxes, numbers), program(boxes, numbers))
    os._exit(0)
end = time.monotonic() + 120
while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
    time.sleep(0.1)
if ended == (0, 0):
    os.kill(child, signal.SIGKILL)
    sys.exit("the child hangs")
sys.exit(os.waitstatus_to_exitcode(ended[1]))
"""


@pytest.mark.slow
def test_a_child_with_one_thread_compiles_by_itself(tmp_path):
    run_python(FORK, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
