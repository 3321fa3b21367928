// llama.cpp's greedy tokens after some: node llama_cpp.mjs FILE.gguf [IDS] COUNT TEXT, in a folder with node_modules.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const installed = createRequire(`${process.cwd()}/`).resolve("node-llama-cpp");
const { getLlama } = await import(pathToFileURL(installed));
const [file, ids, count, text] = process.argv.slice(2);
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error", maxThreads: 1 });
const model = await llama.loadModel({ modelPath: file });
const sequence = (await model.createContext({ contextSize: 64 })).getSequence();
const drawn = [];
for await (const token of sequence.evaluate(JSON.parse(ids), { temperature: 0 })) {
  drawn.push(token);
  if (drawn.length === Number(count)) break;
}
console.log(JSON.stringify({ drawn, tokens: model.tokenize(text) }));
process.exit(0);
