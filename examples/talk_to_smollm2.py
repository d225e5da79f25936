"""Ask a real LLM something aloud: your question is heard by a Zipper model, answered by SmolLM2 as itself, and spoken.

MODEL is what examples/sentences-smollm2.yaml makes, or any other fusion of an instruct model (its tokenizer has a chat
template) with a speech tower. Each QUESTION is a sound file; FOLDER gets the answers as sounds and a page to play them.

    python examples/talk_to_smollm2.py MODEL QUESTION.wav [QUESTION.wav ...] --output FOLDER
"""

import argparse
import html
import shutil
from pathlib import Path

import soundfile

from zipper_lm import ZipperModel
from zipper_lm.codecs.audio import SAMPLING_RATE
from zipper_lm.evaluation.word_error_rate import normalise
from zipper_lm.models.conversation import Turn, answer_aloud, check_can_talk
from zipper_lm.utils.files import new_folder

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Talk to an LLM</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 44em; margin: 2em auto; padding: 0 1em }}
section {{ border-top: 1px solid #aaa; padding: 1em 0 }} audio {{ width: 100% }}</style>
<h1>Talk to an LLM</h1>
<p>Zips hear the question and speak the answer, which is the frozen text tower's own, by its chat template.</p>
{turns}</html>
"""


def main(model: str, questions: list[str], output: str, tokens: int = 48, overwrite: bool = False) -> list[Turn]:
    """Returns a turn for each question."""
    loaded = ZipperModel.from_pretrained(model).eval()
    check_can_talk(loaded)
    turns = []
    with new_folder(output, overwrite) as folder:
        told = []
        for number, question in enumerate(questions, 1):
            # That model was trained on small letters without punctuation, and so it is given those to speak.
            turn = answer_aloud(loaded, question, tokens=tokens, written_as=normalise)
            asked = f"question-{number}{Path(question).suffix}"
            shutil.copyfile(question, folder / asked)
            soundfile.write(folder / f"answer-{number}.wav", turn.sound, SAMPLING_RATE)
            told.append(section(asked, f"answer-{number}.wav", turn))
            turns.append(turn)
            print(f"heard:    {turn.heard}\nanswered: {turn.answer}")
        (folder / "index.html").write_text(PAGE.format(turns="\n".join(told)), encoding="utf-8")
    print(f"{output}/index.html")
    return turns


def section(asked: str, answered: str, turn: Turn) -> str:
    """One turn as HTML."""
    sounds = [f'<audio controls src="{html.escape(file, quote=True)}"></audio>' for file in (asked, answered)]
    heard, answer = html.escape(turn.heard), html.escape(turn.answer)
    return f"<section><p>Asked:</p>{sounds[0]}<p>Heard: {heard}</p><p>Answered: {answer}</p>{sounds[1]}</section>"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--output", required=True)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most")
    parser.add_argument("--overwrite", action="store_true")
    main(**vars(parser.parse_args()))
