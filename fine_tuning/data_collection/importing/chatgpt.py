"""ChatGPT's conversations.json."""

from fine_tuning.data_collection.importing.pieces import (
    Found,
    as_list,
    as_object,
    kind_of,
    nodes_of,
    path_to,
    text_of,
    what_is_lost,
)


def read_chatgpt(record: dict) -> Found:
    """ChatGPT's conversations.json is a tree of nodes: what the person saw is the path from `current_node` up."""
    nodes = nodes_of(record["mapping"])
    leaf = record.get("current_node")
    if not isinstance(leaf, str) or leaf not in nodes:
        leaf = max(nodes, key=lambda name: (_created(nodes[name]), name), default=None)
    messages: list[dict] = []
    consulted = False  # a tool, whose call and answer the export has only in part
    for node in path_to(nodes, leaf, "parent"):
        said = as_object(node.get("message"))
        metadata, content = as_object(said.get("metadata")), as_object(said.get("content"))
        role = as_object(said.get("author")).get("role")
        consulted = role != "user" and (consulted or role == "tool" or said.get("recipient", "all") != "all")
        if metadata.get("is_visually_hidden_from_conversation") or said.get("recipient", "all") != "all":
            continue
        if role not in ("user", "assistant") or content.get("content_type") not in ("text", "multimodal_text"):
            continue
        text = text_of(content.get("parts")).strip()  # of what was spoken, its transcript
        shown = [part for part in as_list(content.get("parts")) if "audio" not in str(kind_of(part))]
        lost = "what a tool returned" if consulted else what_is_lost(shown)
        if text and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"  # one reply that calls of tools had cut into pieces
        elif text or lost:
            model = metadata.get("model_slug") if role == "assistant" else None
            messages.append({"role": role, "content": text, "model": model, "at": said.get("create_time")})
        if lost:
            messages[-1]["lost"] = lost
    identity = record.get("conversation_id") or record.get("id")
    name = f"chatgpt-{identity}" if identity else None
    return Found("chatgpt", messages, name, "chatgpt", record.get("create_time"))


def _created(node: dict) -> float:
    moment = as_object(node.get("message")).get("create_time")
    return moment if isinstance(moment, (int, float)) else 0
