"""Run cells: finished ones are left alone, interrupted ones resume, and one that fails stops no other."""

import logging
import shutil
import sys
import traceback
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import joblib
from tqdm.auto import tqdm

from ..blocks import list_blocks
from ..files import BusyError, locked
from ..finetuner import open_untrained
from ..folder import ModelError, stated_weights
from ..hub import find_model, untrained_recipes
from ..images import ImagePolicy
from ..loading import Splits
from ..recipe import RecipeData
from ..weights import weights_sha256
from .cell import UNTRAINED, Cell, CellResult, ExperimentError, files_hash, open_source_of, run_cell

logger = logging.getLogger(__name__)

DONE, NOT_RUN, UNTRAINED_SOURCE = "done", "not run", "source not trained"


def run_cells(
    cells: Iterable[Cell],
    *,
    results: str | Path,
    runs: str | Path = "runs/cells",
    keep: bool = True,
    jobs: int = 1,
    command: str | None = None,
) -> dict[str, CellResult]:
    """Run cells that have no result yet; each writes a file of its own when it is done.

    joblib runs them: on this machine in ``jobs`` processes, or wherever the backend of a surrounding
    ``joblib.parallel_config`` runs them ("dask", "ray"); all of them must see the folders. Several processes may work on the same
    folders at once: a cell that another one runs is left to it.

    Args:
        cells: Cells to run; one that occurs twice runs once, one whose source is only a recipe so far waits.
        results: Folder of the results.
        runs: Folder of checkpoints, finished batches and models.
        keep: Leave a cell's model and checkpoints in ``runs`` when it is done.
        jobs: Number of cells at a time; they share this machine's cores.
        command: Command that reproduces this run, for the record.

    Returns:
        All results, by the cells' keys.

    Raises:
        ExperimentError: After all others are done, if some failed.
    """
    results, runs = Path(results), Path(runs)
    wanted = {cell.key: cell for cell in cells}
    states = {key: state(cell, results) for key, cell in wanted.items()}
    missing = [cell for key, cell in wanted.items() if states[key] not in (DONE, UNTRAINED_SOURCE)]
    if waiting := [cell.source for key, cell in wanted.items() if states[key] == UNTRAINED_SOURCE]:
        logger.warning("%d cells wait for sources that aren't trained yet: %s", len(waiting), ", ".join(sorted(set(waiting))))
    failed: dict[str, str] = {}
    work = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)(
        joblib.delayed(_run)(cell, results, runs, keep, command, f"cell {number} of {len(missing)}: {cell.title}")
        for number, cell in enumerate(missing, start=1)
    )
    with tqdm(work, total=len(missing), unit="cell", disable=jobs == 1 or not missing, dynamic_ncols=True) as finished:
        for key, error in finished:
            if error is not None:
                logger.warning("%s failed: %s", key, error)
                failed[key] = error
    if failed:
        listed = "\n".join(f"  {key}: {error}" for key, error in failed.items())
        raise ExperimentError(f"{len(failed)} of {len(missing)} cells failed; the others are in {results}:\n{listed}")
    found = {key: result for key, cell in wanted.items() if (result := find_result(cell, results)) is not None}
    if busy := sum(cell.key not in found for cell in missing):
        logger.warning("%d cells are run by another process; run this again when it is done", busy)
    return found


def _run(cell: Cell, results: Path, runs: Path, keep: bool, command: str | None, title: str) -> tuple[str, str | None]:
    """Run one cell in any process; returns its key and what went wrong."""
    tqdm.write(title, file=sys.stderr)
    try:
        source = open_source_of(cell)
        folder = runs / f"{cell.key}-{weights_sha256(source.model)[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "cell.lock"):
            if find_result(cell, results) is None:  # another process may have been faster
                splits = load_target(cell.target, source.model.image_policy)
                done = run_cell(cell, folder, source=source, splits=splits, keep=keep, command=command)
                done.save(result_path(cell, results))
            if not keep:
                shutil.rmtree(folder)
    except BusyError:  # it is in good hands
        return cell.key, None
    except Exception as error:  # whatever stops one cell must not stop the others
        logger.debug("%s", traceback.format_exc())
        return cell.key, str(error) or type(error).__name__
    return cell.key, None


@lru_cache(maxsize=2)
def load_target(target: RecipeData, policy: ImagePolicy) -> Splits:
    """Load the target, once in each process."""
    return target.load(policy, id=target.id)


def state(cell: Cell, results: Path) -> str:
    """State of a cell in words: whether it was run, and what prevents running it, as far as its source and its blocks show."""
    if cell.source in untrained_recipes():
        return UNTRAINED_SOURCE
    if find_result(cell, results) is not None:
        return DONE
    depth, trained = _depth(cell.source.removeprefix(UNTRAINED)), cell.method.trained_blocks
    if depth is None:
        return "source not found"
    return f"source has {depth} blocks" if trained is not None and trained > depth else NOT_RUN


@lru_cache
def _depth(source: str) -> int | None:
    """Number of blocks of a source."""
    try:
        return len(list_blocks(open_untrained(source))) - 1
    except ModelError:
        return None


def result_path(cell: Cell, results: Path) -> Path:
    return results / f"{cell.key}.json"


def find_result(cell: Cell, results: Path) -> CellResult | None:
    """The result of a cell; None if it was not run, or its file is damaged, or its source now has other weights, its target
    files of other names or sizes, or a default another value. All but the first give a warning."""
    path = result_path(cell, results)
    if not path.exists():
        return None
    try:
        found = CellResult.load(path)
    except ValueError as error:
        logger.warning("%s It counts as not run.", error)
        return None
    if not cell.agrees(found.cell):
        logger.warning("%s was run with other settings than its name stands for now; it counts as not run.", path)
        return None
    weights = _weights(cell.source)
    if weights is not None and weights != found.source["weights_sha256"]:
        logger.warning("%s was measured with other weights of %s than it has now; it counts as not run.", path, cell.source)
        return None
    files = files_hash(cell.target.location)
    if files is not None and found.made.get("files") not in (None, files):
        logger.warning("%s was run on other files than lie in %s now; it counts as not run.", path, cell.target.location)
        return None
    return found


def _weights(source: str) -> str | None:
    """Hash of a source's weights as its config states it, if it is on this machine."""
    if source.startswith(UNTRAINED):
        return None
    try:
        folder, _ = find_model(source, local_files_only=True)
        return stated_weights(folder)
    except ModelError:
        return None
