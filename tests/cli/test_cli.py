"""The command line: light until a command is chosen, one line for bad input."""

import re
import resource
import subprocess
import sys
import types

import pytest

import rlseq
from rlseq.cli import main
from rlseq.errors import DataError


@pytest.fixture
def command(monkeypatch):
    """Mounts a module with the given `run` as `rlseq try`, which takes --rows and has a subcommand `deep`."""

    def mount(run):
        module = types.ModuleType("tried")

        def add_arguments(parser):
            parser.add_argument("--rows", type=int)
            deep = parser.add_subparsers().add_parser("deep")
            deep.add_argument("--depth", type=int, required=True)

        module.add_arguments, module.run = add_arguments, run
        monkeypatch.setitem(sys.modules, "tried", module)
        monkeypatch.setitem(main.COMMANDS, "try", main.Command("tried", "Try."))

    return mount


def test_help_names_every_command_and_imports_neither_torch_nor_trl():
    code = (
        "import sys; from rlseq.cli.main import main; code = main(['--help'])\n"
        "print(code, sorted({'torch', 'trl', 'transformers', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "0 []"
    for name in main.COMMANDS:
        assert re.search(rf"^  {name}  +[A-Z].*\.$", ended.stdout, re.MULTILINE)


def test_help_takes_less_than_three_tenths_of_a_second():
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "rlseq.cli.main", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.3  # processor time: waiting for other work on the machine is not the command's


def test_version_is_that_of_the_package(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlseq {rlseq.__version__}\n"


def test_no_command_prints_the_table_and_is_an_error(capsys):
    assert main.main([]) == 2
    assert "evaluate" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys):
    assert main.main(["evalute"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "'evaluate'" in err and err.count("\n") == 1


def test_a_command_gets_its_arguments_and_gives_the_exit_code(command):
    seen = []
    command(lambda args: seen.append(args.rows))
    assert main.main(["try", "--rows", "3"]) == 0
    command(lambda args: args.rows)
    assert main.main(["try", "--rows", "4"]) == 4 and seen == [3]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--row=3"], ["--row", "'--rows'"]),
        (["--rows", "x"], ["--rows", "'x'"]),
        (["deep", "--dept", "1"], ["--depth"]),
        (["deep", "--depth", "1", "--dept=2"], ["--dept", "'--depth'"]),
        (["stray"], ["stray", "deep"]),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_2(command, capsys, argv, words):
    command(lambda args: None)
    assert main.main(["try", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert all(word in err for word in words), err


def test_bad_input_found_by_a_command_is_its_message_alone(command, capsys):
    def run(args):
        raise DataError("no such column")

    command(run)
    assert main.main(["try"]) == 2
    assert capsys.readouterr().err == "error: no such column\n"


def test_a_bug_keeps_its_traceback(command):
    command(lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main.main(["try"])


def test_an_interrupted_command_exits_130(command):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert main.main(["try"]) == 130


def test_output_that_nobody_reads_on_is_no_error():
    code = "import sys; sys.argv = ['rlseq', '--help']; from rlseq.cli.main import main; sys.exit(main())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_every_command_of_the_table_describes_itself(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main.main([name, "--help"])
    assert exit.value.code == 0 and f"rlseq {name}" in capsys.readouterr().out
