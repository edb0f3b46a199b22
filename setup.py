"""Everything comes from settings.ini; nothing is said twice."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
c = config["DEFAULT"]
book = c["book_requirements"].split()

setup(
    name=c["lib_name"],
    version=c["version"],
    description=c["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=c["author"],
    author_email=c["author_email"],
    url=c["git_url"],
    license="Apache-2.0",
    keywords=c["keywords"],
    packages=find_packages(include=["altbp", "altbp.*"]),
    python_requires=">=" + c["min_python"],
    install_requires=c["requirements"].split(),
    extras_require={"book": book, "dev": book + c["dev_requirements"].split()},
    entry_points={"console_scripts": c["console_scripts"].split()},
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: " + c["audience"]],
)
