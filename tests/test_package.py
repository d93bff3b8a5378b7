"""The package as a user gets it."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cartl_hub

ROOT = Path(__file__).parent.parent


def test_every_public_name_can_be_imported():
    assert len(cartl_hub.__all__) > 30
    for name in cartl_hub.__all__:
        assert getattr(cartl_hub, name) is not None


@pytest.mark.parametrize("first", ["import cartl_hub, timm", "import timm, cartl_hub"])
def test_architectures_are_registered_in_either_order(first):
    script = f"{first}\nprint(timm.create_model('wrn10_1').num_features)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "64", done.stderr


def test_readme_lists_the_models_of_the_cards():
    from cartl_hub.hub import models_table, recipes_table

    for page, begin, table in (
        (ROOT / "README.md", "<!-- models: cartl-hub sources --markdown -->\n", models_table()),
        (ROOT / "model_cards" / "README.md", "<!-- recipes: cartl-hub sources --markdown --recipes -->\n", recipes_table()),
    ):
        assert page.read_text().partition(begin)[2].partition("<!-- end -->")[0].strip() == table


def test_links_of_the_pages_lead_somewhere():
    pages = [path for path in ROOT.rglob("*.md") if not {".venv", "runs"} & set(path.relative_to(ROOT).parts)]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, heading = link.partition("#")
            if "://" in link or (not path and not heading):
                continue
            target = page.parent / path if path else page
            assert target.exists(), f"{page}: {link}"
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, link


def test_cards_are_what_their_reports_say():
    from cartl_hub import load_model, load_recipe
    from cartl_hub.card import render_card
    from cartl_hub.folder import read_report
    from cartl_hub.hub import bundled_models

    for model_id, folder in bundled_models().items():
        if folder.parent.name != "model_cards":
            continue
        report, model = read_report(folder), load_model(folder)
        assert model.lineage["name"] == model_id
        if (folder / "recipe.yaml").exists():  # a transferred model comes from a cell of the tables
            recipe = load_recipe(folder)
            assert (recipe.id, recipe.title) == (model_id, model.lineage["title"])
        else:
            assert model.lineage["source"]["id"] in bundled_models()
        assert render_card(model, report=report) == (folder / "README.md").read_text()


def test_wheel_works_in_an_empty_folder(tmp_path):
    """Built from the checkout and unpacked elsewhere: the models travel inside it."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import cartl_hub, torch\n"
        "model = cartl_hub.load_model('wrn16_2.fdm4_cifar100')\n"
        "print(cartl_hub.__file__, len(model.label_names), tuple(model(torch.rand(1, 3, 32, 32)).shape))\n"
        "print([info.id for info in cartl_hub.list_sources()])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert str(tmp_path / "site") in done.stdout, done.stderr
    assert "100 (1, 100)" in done.stdout
    cards = sorted(path.parent.name for path in (ROOT / "model_cards").glob("*/model.safetensors"))
    assert len(cards) >= 4
    assert str(cards) in done.stdout
