// Compiles nps.ksy to nps.py. In the folder of this file, or one above it:
//   npm install --no-save kaitai-struct-compiler@0.11.0 js-yaml@5.5.0
//   node compile.mjs ../nps.ksy nps.py
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import compiler from "kaitai-struct-compiler";
import { load } from "js-yaml";

const [source = "nps.ksy", target = "nps.py", language = "python"] = process.argv.slice(2);
try {
  const files = await compiler.compile(language, load(readFileSync(source, "utf8")));
  const texts = Object.values(files);
  if (language === "python" && texts.length !== 1) throw new Error(`${texts.length} files`);
  const digest = createHash("sha256").update(readFileSync(source)).digest("hex");
  const note = language === "python" ? `# From nps.ksy, SHA-256 ${digest}\n` : "";
  writeFileSync(target, note + texts.join("\n").replace(/[ \t]+$/gm, "").trimEnd() + "\n");
} catch (error) {
  console.error(String(error.message ?? error));
  process.exit(1);
}
