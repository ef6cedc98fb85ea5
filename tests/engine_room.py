"""The engine: passes, processes, kills, checkpoints, one process per run."""

LATE = ["--stage", "diffusion", *flags(TINY)]  # what a copy of `run` without its checkpoint still has to do


def test_batches_walk_through_epochs():
    """Every item once per epoch, in another order each time, whatever the batch; a batch may span several."""
    walk = np.concatenate([train.batch_indices(7, 5, 0, "diffusion", step) for step in range(7)]).reshape(5, 7)
    assert (np.sort(walk) == np.arange(7)).all() and len({tuple(epoch) for epoch in walk.tolist()}) == 5
    assert np.array_equal(train.batch_indices(7, 35, 0, "diffusion", 0), walk.flatten())


def test_passes_and_recomputation(undone, run, folder, capsys):
    """--micro-batch changes nothing but rounding, --activation-checkpointing not even that; --compile compiles."""
    words = ["--data", folder, "--out", undone, *LATE]
    expected = weights_of(run)
    compiled = []
    for flag in ["--micro-batch", 1], ["--micro-batch", 4], ["--activation-checkpointing"], ["--compile"]:
        with mock.patch.object(torch, "compile", lambda f: compiled.append(f) or f), mock.patch.object(
                train, "partial_loss", wraps=train.partial_loss) as passes:
            assert call(train, *words, *flag) == 0
        assert passes.call_count == 8 * (2 if flag[0] == "--micro-batch" else 1) * (1 + (flag[-1] == 1))
        if flag[0] == "--micro-batch":  # AdamW divides by gradients that may be tiny: rounding times some hundred
            close(weights_of(undone), expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(weights_of(undone), expected)
        (undone / "ckpt.pt").unlink()
    assert len(compiled) == 1
    with mock.patch.object(torch, "compile", side_effect=torch._dynamo.exc.TorchDynamoException("no compiler")):
        assert call(train, *words, "--compile") == 1
    assert "torch.compile does not work here (no compiler): leave --compile away" in capsys.readouterr().err
    assert call(train, *words, "--fsdp") == 2 and "start them by torchrun" in capsys.readouterr().err


def one_of_two(rank, jobs):
    """What torchrun starts twice: train.py, or sample.py, with each of some command lines."""
    train.DRAWS = train.FINAL_DRAWS = 256
    for port, words in jobs:
        program = train if str(words[0]).startswith("--") else sample
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        assert call(program, *words) == 0


def test_two_processes_train_as_one(run, folder, tmp_path):
    """Global batch 64, 20 steps: the weights of one process to 1e-5. So with --fsdp, which goes on from those; and the
    tokenizer, its discriminator and flips included."""
    settings = {k: v for k, v in TINY.items() if k not in train.TOKENIZER_OPTIONS.values()}
    settings |= dict(steps=20, batch=64, depth=2, teacher="ema", save_every=10, sample_every=10)
    words, (one, two, split) = ["--data", run / "tokens.npy", *flags(settings)], (tmp_path / name for name in "abc")
    assert call(train, *words, "--out", one) == 0
    expected = weights_of(one)
    shutil.copytree(one, split)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        ports = [server.getsockname()[1] for server in servers]
    images = ["--data", folder, *flags(TINY | {"flip": True, "tokenizer_steps": 6, "log_every": 1})]
    options = ["--fsdp", "--activation-checkpointing", "--micro-batch", 20, "--steps", 25, "--out", split]
    drawing = [run / "ckpt.pt", "--n", 21, "--batch", 4, "--out"]
    jobs = zip(ports, ([*words, "--out", two], words + options, [*images, "--out", tmp_path / "e"],
                       [*drawing, tmp_path / "e.npz"]), strict=True)
    torch.multiprocessing.spawn(one_of_two, (list(jobs),), 2)
    assert call(train, *images, "--stage", "tokenizer", "--out", tmp_path / "d") == 0
    assert call(sample, *drawing, tmp_path / "d.npz") == 0
    assert np.array_equal(*(np.load(tmp_path / name)["arr_0"] for name in ("d.npz", "e.npz")))
    by_one, by_two = (contents(tmp_path / name)["tokenizer.csv"] for name in "de")
    for a, b in zip(by_one, by_two, strict=True):  # five decimals of each term
        assert {k: float(v) for k, v in a.items()} == pytest.approx({k: float(v) for k, v in b.items()}, abs=2e-5)
    assert float(by_one[-1]["adversarial"]) and (tmp_path / "e" / "ckpt.pt").exists()
    close(weights_of(two), expected, rtol=0, atol=1e-5)
    assert contents(two)["samples_000010.png"] == contents(one)["samples_000010.png"]
    for steps in (25, 26):  # what FSDP2 wrote is a checkpoint like any other
        assert call(train, *words, "--out", one, "--steps", steps) == 0
        close(weights_of(split), weights_of(one), rtol=0, atol=1e-5)
        assert {path.name for path in split.iterdir()} == {path.name for path in one.iterdir()}
        assert steps == 26 or call(train, *words, "--out", split, "--steps", 26) == 0


def test_two_kills(folder, run, tmp_path):
    """SIGKILL at two random moments, then the same command: every file is the undisturbed run's."""
    out, moments = tmp_path / "pets", random.Random()
    words = ["--data", folder, "--out", out, *flags(TINY)]
    for _ in range(2):
        kills.start(words, moments.uniform(0, 0.6))
    assert call(train, *words) == 0 and contents(out) == contents(run)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_the_checkpoint_before(damage, undone, run, folder, capsys):
    """A last checkpoint that is truncated, or was being renamed: the run goes on from the one before, and says so."""
    words, path = ["--data", folder, "--out", undone, *LATE, "--save-every", 2], undone / "ckpt.pt"
    real = train.write_atomically

    def stop_after(file, write, **options):
        real(file, write, **options)
        if file == path and torch.load(path, weights_only=True)["step"] == 6:
            raise MemoryError

    with mock.patch.object(train, "write_atomically", stop_after), pytest.raises(MemoryError):
        call(train, *words)
    assert torch.load(sample.previous(path), weights_only=True)["step"] == 4
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
        assert call(sample, path) == 2 and "ckpt.previous.pt is the one before" in capsys.readouterr().err
    else:
        path.unlink()
    assert call(train, *words) == 0
    said = capsys.readouterr().out
    assert "going on from there, step 4" in said and "continuing at step 4" in said
    assert contents(undone) == contents(run)


def test_half_a_line(tmp_path):
    """What a kill leaves of a table: rows after the checkpoint, half a row, half a header, an empty file."""
    path = tmp_path / "a.csv"
    for text, left in (("step,loss\n2,5\n4,6\n6,7\n", "step,loss\n2,5\n4,6\n"),
                       ("step,loss\n2,5\n4", "step,loss\n2,5\n"), ("step,lo", None), ("", None)):
        path.write_text(text)
        train.trim_rows(path, 4)
        assert (path.read_text() if path.exists() else None) == left


def test_one_process_per_run(folder, run, tmp_path, capsys):
    """A run directory that another process works in is refused, until that process dies, however it dies."""
    shutil.copytree(run, tmp_path / "pets")
    words = ["--data", folder, "--out", tmp_path / "pets", *flags(TINY)]
    hold = "import pathlib, sys, time, train; x = train.lock(pathlib.Path(sys.argv[1])); print('held'); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-uc", hold, tmp_path / "pets"], stdout=subprocess.PIPE, cwd=HERE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert call(train, *words) == 2 and "is in use by another process" in capsys.readouterr().err
        holder.kill()
    assert call(train, *words) == 0
    with mock.patch.object(train, "fcntl", None):  # Windows: no lock, but it works
        assert call(train, *words) == 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite(what, undone, run, folder, capsys):
    """The step, its terms, and the checkpoint before it, unharmed; nothing is replaced by a zero in silence."""
    words, real, calls = ["--data", folder, "--out", undone, *LATE, "--log-every", 4], train.partial_loss, []

    def broken(*args, **options):
        loss, terms = real(*args, **options)
        calls.append(1)
        if len(calls) != 6:
            return loss, terms
        # A square root at 0: the value is finite, its slope is not.
        return (loss * math.nan, terms * math.nan) if what == "loss" else (loss + (loss - loss).abs().sqrt(), terms)

    with mock.patch.object(train, "partial_loss", broken):
        assert call(train, *words) == 1
    said = capsys.readouterr().err
    assert "loss or its gradient is not finite at step 6 (rec " in said and said.count("\n") == 1
    assert "norm nan" in said and ("rec nan" in said) == (what == "loss") and "last checkpoint is kept" in said
    assert torch.load(undone / "ckpt.pt", weights_only=True)["step"] == 4
    assert call(train, *words) == 0 and torch.equal(weights_of(undone), weights_of(run))


def test_stopping_twice(folder, tmp_path):
    """A second Ctrl-C ends a run at once; a second kill, as schedulers send it, does not keep it from saving."""
    with mock.patch.object(train, "SIGNALS", [signal.SIGTERM]) as received:
        train.on_signal(signal.SIGTERM, None)
        train.on_signal(signal.SIGINT, None)
        with pytest.raises(KeyboardInterrupt):
            train.on_signal(signal.SIGINT, None)
        assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
