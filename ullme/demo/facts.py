"""Relations, word lists and sentence templates of the synthetic dataset.

The templates of a relation's passages and of its queries share no content words, so a query and its passage have little
in common but the entity's name. ``{s}`` stands for the subject, ``{o}`` for the object.
"""

from __future__ import annotations

from dataclasses import dataclass


def _split(text: str) -> list[str]:
    return text.split()


SYLLABLES = _split(
    "ba be bi bo da de di do fa fe fi fo ga ge go gu ka ke ki ko la le li lo "
    "ma me mi mo na ne ni no pa pe pi po ra re ri ro sa se si so ta te ti to va ve vi vo"
)
ENDINGS = _split("ban del din far gor kan lim lor mar men nor pel ras rin sol tan ter tis vel vor")

KINDS = ("person", "town", "company", "instrument")

WORDS = {
    "craft": _split("baker carpenter clockmaker gardener lawyer painter sailor tailor weaver doctor shepherd printer"),
    "goods": _split(
        "amber barley candles carpets copper glass honey lamps leather olives paper pepper salt silk soap tea"
    ),
    "month": _split("January February March April May June July August September October November December"),
    "wood": _split("ash bamboo beech cedar cherry ebony elm maple oak pear pine walnut"),
    "mood": _split("bright dark dry gentle harsh hollow mild piercing sweet warm"),
    "occasion": _split("weddings funerals harvests banquets markets coronations parades dances"),
    "year": [str(year) for year in range(1700, 1900, 7)],
    "count": _split("two three four five six seven eight nine ten eleven twelve"),
    "thousands": [
        f"{n} thousand" for n in _split("two three four five six seven eight nine twenty thirty forty sixty")
    ],
}


@dataclass(frozen=True)
class Relation:
    """A relation that every entity of one kind has to one object.

    Args:
        name: unique.
        subject: kind of the subject, one of ``KINDS``.
        object: kind of the object, one of ``KINDS``, or a key of ``WORDS``.
        statements: templates for passages, with ``{s}`` and ``{o}``.
        questions: templates for queries, with ``{s}``.
    """

    name: str
    subject: str
    object: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = (
    Relation(
        "born in",
        "person",
        "town",
        ("{s} was born in {o}.", "The cradle of {s} stood in {o}.", "Parish books show that {s} was baptised at {o}."),
        ("where does {s} come from?", "what is the native place of {s}?", "which home did {s} have as a child?"),
    ),
    Relation(
        "taught by",
        "person",
        "person",
        ("{s} studied under {o}.", "As a pupil, {s} took lessons from {o}.", "{s} spent an apprenticeship with {o}."),
        ("who was the teacher of {s}?", "which mentor instructed {s}?", "by whom was {s} educated?"),
    ),
    Relation(
        "craft",
        "person",
        "craft",
        ("{s} worked as a {o}.", "By trade {s} was a {o}.", "Neighbours hired {s} as their {o}."),
        ("what job did {s} do?", "how did {s} earn money?", "which profession did {s} choose?"),
    ),
    Relation(
        "heir",
        "person",
        "person",
        ("{s} left all belongings to {o}.", "{o} inherited the house of {s}.", "The will of {s} names only {o}."),
        ("who is the heir of {s}?", "to whom did the wealth of {s} go?", "who got the fortune of {s}?"),
    ),
    Relation(
        "died",
        "person",
        "year",
        ("{s} died in {o}.", "A grave stone of {o} marks where {s} was buried.", "{s} passed away in {o}."),
        ("when did the life of {s} end?", "until which date did {s} live?", "what is the last date known of {s}?"),
    ),
    Relation(
        "exports",
        "town",
        "goods",
        ("{s} exports {o}.", "Ships leave {s} loaded with {o}.", "Caravans carry {o} out of {s}."),
        ("what does {s} sell abroad?", "which wares do foreign buyers get from {s}?", "on what trade does {s} rely?"),
    ),
    Relation(
        "inhabitants",
        "town",
        "thousands",
        ("{s} counts {o} inhabitants.", "The census found {o} souls in {s}.", "{s} is settled by {o} citizens."),
        ("how many people live in {s}?", "what is the population of {s}?", "how big is {s}?"),
    ),
    Relation(
        "mayor",
        "town",
        "person",
        ("{s} is governed by mayor {o}.", "The mayor of {s} is called {o}.", "In {s}, the council obeys {o}."),
        ("who rules {s}?", "which politician leads {s}?", "who is the head of administration at {s}?"),
    ),
    Relation(
        "fair",
        "town",
        "month",
        ("{s} holds its fair in {o}.", "Each {o}, stalls and jugglers fill {s}.", "Crowds dance in {s} every {o}."),
        ("when do they celebrate at {s}?", "what is the date of the festival of {s}?", "best time for a feast at {s}?"),
    ),
    Relation(
        "built by",
        "town",
        "company",
        (
            "The walls of {s} were built by {o}.",
            "{s} let {o} erect its bridge.",
            "Masons of {o} raised the tower of {s}.",
        ),
        (
            "which contractor constructed {s}?",
            "who is the architect behind {s}?",
            "to whom does {s} owe its monuments?",
        ),
    ),
    Relation(
        "founded by",
        "company",
        "person",
        ("{s} was founded by {o}.", "{o} laid the foundation of {s}.", "With a small inheritance {o} established {s}."),
        ("who started {s}?", "which entrepreneur set up {s}?", "whose idea was {s}?"),
    ),
    Relation(
        "seat",
        "company",
        "town",
        ("{s} has its headquarters in {o}.", "{s} is run from {o}.", "The offices of {s} are in {o}."),
        ("where is {s} based?", "what is the address of {s}?", "which location does {s} occupy?"),
    ),
    Relation(
        "makes",
        "company",
        "goods",
        ("{s} manufactures {o}.", "Workers at {s} turn out {o}.", "The factory of {s} is known for {o}."),
        ("what does {s} produce?", "which product can one buy of {s}?", "what article made {s} rich?"),
    ),
    Relation(
        "opened",
        "company",
        "year",
        (
            "{s} opened its doors in {o}.",
            "{s} was entered in the register in {o}.",
            "{s} has been in business since {o}.",
        ),
        ("how old is {s}?", "when did {s} begin?", "what is the age of {s}?"),
    ),
    Relation(
        "bought by",
        "company",
        "company",
        ("{s} was bought by {o}.", "{o} took over {s}.", "All shares of {s} went to {o}."),
        ("who acquired {s}?", "which firm is the owner of {s}?", "what is the parent group of {s}?"),
    ),
    Relation(
        "designed by",
        "instrument",
        "person",
        ("The {s} was designed by {o}.", "{o} drew the first {s}.", "The {s} goes back to a sketch of {o}."),
        ("who invented the {s}?", "whose creation is the {s}?", "which genius devised the {s}?"),
    ),
    Relation(
        "wood",
        "instrument",
        "wood",
        ("The {s} is carved from {o}.", "The body of a {s} is {o}.", "Luthiers cut the {s} out of {o}."),
        ("what material is the {s} made of?", "which timber does a {s} need?", "what does one build a {s} with?"),
    ),
    Relation(
        "strings",
        "instrument",
        "count",
        ("The {s} has {o} strings.", "{o} strings are stretched over the {s}.", "A {s} is strung with {o} courses."),
        (
            "how many cords belong to a {s}?",
            "what number of wires does the {s} use?",
            "how many lines to tune on a {s}?",
        ),
    ),
    Relation(
        "sound",
        "instrument",
        "mood",
        ("The {s} sounds {o}.", "Listeners call the voice of the {s} {o}.", "A {o} ring is proper to the {s}."),
        ("what tone has the {s}?", "how would you describe hearing a {s}?", "what is the timbre of the {s} like?"),
    ),
    Relation(
        "played at",
        "instrument",
        "occasion",
        ("The {s} is played at {o}.", "Musicians bring the {s} to {o}.", "No {o} go by without the {s}."),
        ("on which event does one perform on a {s}?", "why do people want a {s}?", "what purpose serves the {s}?"),
    ),
)

FILLERS = (
    "Old travellers like to repeat this to anyone who listens.",
    "So at least the chronicle of the abbey tells us.",
    "Later scholars have confirmed the story more than once.",
    "Few readers outside the region remember it today.",
    "There is no reason to doubt the source of this.",
    "A note in the margin of the book says the same.",
    "Nobody in the neighbourhood would ever deny it.",
    "The archive keeps a long letter that mentions it.",
    "Much else about those times has been forgotten.",
    "It is mentioned in every almanac of the country.",
    "The papers that survive are silent on the rest.",
    "Even so, opinions still differ on some of the details.",
)
MENTIONS = (
    "Much has been written about {s} in our days.",
    "First of all, a word or two on {s}.",
    "Here is what we know for certain about {s}.",
    "This page of the lexicon is about {s}.",
    "The name {s} appears in many old books.",
)
