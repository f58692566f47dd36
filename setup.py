"""What pyproject.toml cannot say: a wheel carries the data and the pages beside the package.

They are one more package of it, gptailor.files (gptailor/shipped.py finds them).
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup

shutil.rmtree(Path(__file__).parent / "build" / "lib", ignore_errors=True)  # or modules that have gone would go along
setup(
    script_name="setup.py",  # which is then no module of gptailor.files; streamlit_app.py is
    packages=[*find_packages(include=["gptailor", "gptailor.*"]), "gptailor.files"],
    package_dir={"gptailor.files": "."},
    package_data={
        "gptailor": ["py.typed"],
        "gptailor.dashboard": ["*.svg"],
        "gptailor.store": ["migrations/*.sql"],
        "gptailor.files": [
            "data/presets/**/*.yaml",
            "data/benchmarks/**/*.yaml",
            "data/experiments/**/*.yaml",
            "data/demo/**/*",
            "pages/*.py",
            ".streamlit/config.toml",
        ],
    },
    exclude_package_data={
        "gptailor.files": ["data/demo/*.py", "data/demo/pool/*", "data/demo/times/*", "**/__pycache__/*", "**/*.lock"]
    },
)
