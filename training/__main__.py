"""`accelerate launch training clip`, `accelerate launch -m vlp.training clip`, `python -m vlp.training clip`."""

import importlib.util
import os
import sys

os.environ.setdefault("VLP_PARENT", str(os.getppid()))  # see run.ends_with_its_launcher
if os.environ.get("RANK", "0") == "0":
    if importlib.util.find_spec("vlp_launcher"):  # else only this folder was copied
        from vlp_launcher import check

        check(["train", *sys.argv[1:]])  # answers --help and wrong options at once
    print("Loading torch and transformers (a few seconds).", flush=True)
if not __package__:
    sys.path.pop(0)  # launched as a folder: import its modules from the package `vlp`, not as top-level modules
try:
    from vlp.training.run import main
except KeyboardInterrupt:
    sys.exit(130)
except ModuleNotFoundError as error:
    if error.name != "vlp":
        raise
    sys.exit("vlp is not installed in this Python: run `pip install -e .` in the repository, or `make venv`.")

if __name__ == "__main__":
    main()
