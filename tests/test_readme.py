"""README.md is kept true: its example prints the plan shown, .ci/run runs its commands, its links lead somewhere.

`python -m tests.test_readme` writes the plan that is printed now into it.
"""

import pathlib
import re
import subprocess
import sys

from tests.as_users_run import environment

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def printed_plan():
    """In a process of its own, without this suite's float64: as a reader would run it."""
    example, rest = blocks("python")
    script = f"{example}\nprint('=' * 20)\n{rest}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("=" * 20)[0].rstrip() + "\n"


def test_the_example_prints_the_plan_shown():
    (shown,) = blocks("text")
    assert printed_plan() == shown


def test_the_example_is_short():
    example, _ = blocks("python")
    statements = [line for line in example.splitlines() if line.strip()]
    assert len(statements) < 20


def test_continuous_integration_runs_the_commands_shown():
    """The script takes them from the README by number, so they cannot drift; here its extraction is tried."""
    script = (ROOT / ".ci" / "run").read_text()
    (function,) = re.findall(r"^readme_command\(\).*?^}$", script, flags=re.MULTILINE | re.DOTALL)
    commands = blocks("sh")
    assert len(commands) == 2
    for number, command in enumerate(commands, start=1):
        call = f"{function}\nreadme_command {number}"
        taken = subprocess.run(["bash", "-c", call], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert taken == command
        assert f"$(readme_command {number})" in script
    assert [len(command.splitlines()) for command in commands] == [1, 1]


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_it_is_under_a_hundred_lines():
    assert README.count("\n") < 100


if __name__ == "__main__":
    (shown,) = blocks("text")
    (ROOT / "README.md").write_text(README.replace(shown, printed_plan()))
