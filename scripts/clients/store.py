"""A store of models as Ollama makes it."""

import hashlib
import json

from paths import DEMO


def write_story(folder):
    """Writes one with the demo model as `story`, under a template that knows tools."""
    template = """\
{{- if .Tools }}You may call:{{ range .Tools }}
{{ . }}{{ end }}
{{ end }}{{ range .Messages }}{{ .Role }}: {{ .Content }}{{ range .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ end }}
{{ end }}assistant: """
    (folder / "blobs").mkdir(parents=True)

    def layer(kind, content):
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        (folder / "blobs" / digest.replace(":", "-")).write_bytes(content)
        return {"mediaType": "application/vnd.ollama.image." + kind, "digest": digest, "size": len(content)}

    parts = {"model": DEMO.read_bytes(), "template": template.encode(), "params": b'{"temperature": 0}'}
    config = layer("config", b"{}") | {"mediaType": "application/vnd.docker.container.image.v1+json"}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": config,
        "layers": [layer(kind, content) for kind, content in parts.items()],
    }
    path = folder / "manifests/registry.ollama.ai/library/story/latest"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest))
