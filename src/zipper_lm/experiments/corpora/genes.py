"""genes: random coding sequences of DNA and the proteins they stand for, by the standard genetic code.

A gene is a start codon (ATG), a codon for each further residue, drawn from its synonyms, and a stop codon. Three
letters of DNA make one of protein; a reader of DNA has to find the frame and to learn the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from zipper_lm.experiments.corpora.writing import write_rows

BASES = "TCAG"
RESIDUES = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
"""The standard genetic code (translation table 1 of the NCBI): the residue of each codon, in the order of `BASES`, the
first base changing slowest; ``*`` is stop."""
CODE = {"".join(codon): residue for codon, residue in zip(product(BASES, repeat=3), RESIDUES)}
START, STOP = "ATG", "*"
SYNONYMS = {residue: [c for c, r in CODE.items() if r == residue] for residue in sorted({*RESIDUES})}
LENGTHS = (6, 16)
"""Fewest and most residues of a protein, the first, always methionine, counted."""
SIZES = {"train": 4000, "validation": 100, "test": 300}
SEED = 0


def write_genes(folder: str | Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write rows ``{"dna": gene, "protein": residues}`` in splits train, validation and test; no protein comes twice.

    Args:
        folder: to be made. overwrite: replace what is there.

    Returns:
        Rows in each split.

    Raises:
        ValueError: as `write_rows`.
    """
    streams = dict(zip(SIZES, np.random.SeedSequence(SEED).spawn(len(SIZES))))
    seen: set[str] = set()

    def rows(split: str) -> Iterator[dict[str, str]]:
        draw, count = np.random.default_rng(streams[split]), 0
        while count < SIZES[split]:
            dna = gene(draw)
            protein = translate(dna)
            if protein not in seen:
                seen.add(protein)
                count += 1
                yield {"dna": dna, "protein": protein}

    return write_rows(folder, {split: rows(split) for split in SIZES}, overwrite=overwrite)


def gene(draw: np.random.Generator) -> str:
    """A random coding sequence, from the start codon to a stop codon; every residue is as likely as any other."""
    residues = [r for r in SYNONYMS if r != STOP]
    inner = draw.integers(len(residues), size=draw.integers(LENGTHS[0], LENGTHS[1] + 1) - 1)
    codons = [SYNONYMS[r] for r in [*(residues[i] for i in inner), STOP]]
    return START + "".join(same[int(draw.integers(len(same)))] for same in codons)


def translate(dna: str) -> str:
    """The protein of a coding sequence: its codons' residues, up to the first stop codon or the last whole codon.

    Raises:
        ValueError: if `dna` has other letters than A, C, G and T.
    """
    if wrong := sorted(set(dna) - set(BASES)):
        raise ValueError(f"dna must be of A, C, G and T; it has {wrong}")
    residues = (CODE[dna[i : i + 3]] for i in range(0, len(dna) - 2, 3))
    return "".join(residues).partition(STOP)[0]
