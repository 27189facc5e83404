from __future__ import annotations

import logging

from ullme.utils.messages import show_messages


def test_what_a_logger_says_is_shown_once_unless_the_application_shows_it(capsys):
    logger = logging.getLogger("ullme_test_of_messages")
    logger.propagate = False  # pytest has handlers at the root
    logger.warning("a warning, by Python itself")
    logger.info("not shown")
    for _ in range(2):
        show_messages(logger.name)
    logging.getLogger(f"{logger.name}.part").info("an info")
    assert capsys.readouterr().err.splitlines() == ["a warning, by Python itself", "an info"]
    own = logging.getLogger("ullme_test_of_an_application")
    own.addHandler(logging.NullHandler())
    show_messages(own.name)
    assert own.level == logging.NOTSET
