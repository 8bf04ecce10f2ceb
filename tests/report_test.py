from mixcpt_jax.reporting import report as report_lib


def evaluation(**values):
    return {"step": 0} | {k.replace("__", "/"): v for k, v in values.items()}


def test_the_table_shows_before_after_and_change_of_every_phase():
    results = {
        "mixcpt": {
            "before": evaluation(domain__perplexity=20.0, domain__exam=0.25),
            "after": evaluation(domain__perplexity=15.5, domain__exam=0.5),
        },
        # A comparison phase starts from the same model and does not measure it again.
        "plain": {
            "before": None,
            "after": evaluation(domain__perplexity=14.0, domain__exam=0.125),
        },
    }
    lines = report_lib.comparison(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "before", "after mixcpt", "change", "after plain", "change"]
    assert cells[2] == [
        "domain: perplexity",
        "20.00",
        "15.50",
        "-4.50",
        "14.00",
        "-6.00",
    ]
    assert cells[3] == ["domain: exam, %", "25.0", "50.0", "+25.0", "12.5", "-12.5"]


def test_phases_that_measure_nothing_are_left_out(tmp_path, capsys):
    results = {
        "cpt": {"before": evaluation(a__perplexity=2.0), "after": evaluation()},
        "select": {"selection": {}},
    }
    header, *_ = report_lib.comparison(results).splitlines()
    assert "after cpt" in header
    assert "select" not in header
    report_lib.write(str(tmp_path), {"export": {"folder": "hf"}})
    assert {path.name for path in tmp_path.iterdir()} == {"report.json"}
    assert str(tmp_path) in capsys.readouterr().out
