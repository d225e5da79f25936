"""Texts that Python takes and that no answer can hold."""

from typing import Any

import pytest
from tiny_served import NAME


@pytest.mark.parametrize("odd", ['"\\ud800"', "NaN", "-Infinity"])
def test_what_no_answer_can_repeat_is_refused(client: Any, odd: str) -> None:
    """Half of a UTF-16 pair is JSON to Python, but no UTF-8: the refusal that repeated it could not be sent, and became
    a 500; on a websocket it ended the conversation."""
    body = f'{{"model": {odd}, "input": "one", "voice": "alloy"}}'
    answer = client.post("/v1/audio/speech", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "invalid_json"
    with client.websocket_connect("/v1/realtime", headers={"host": "127.0.0.1"}) as socket:
        assert socket.receive_json()["type"] == "session.created"
        socket.send_text(f'{{"type": {odd}}}')
        assert socket.receive_json()["error"]["code"] == "invalid_json"
        socket.send_text('{"type": "input_audio_buffer.clear"}')
        assert socket.receive_json()["type"] == "input_audio_buffer.cleared"
    assert client.get(f"/v1/models/{NAME}").status_code == 200
