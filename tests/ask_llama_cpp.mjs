// node ask_llama_cpp.mjs FOLDER_WITH_node-llama-cpp MODEL.gguf QUESTION...: one answer a line, greedy, as JSON.
// The chat template and the tokens that end an answer are those of the file; nothing else is told.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [tools, file, ...questions] = process.argv.slice(2);
const find = createRequire(pathToFileURL(`${tools}/`)).resolve;
const {getLlama} = await import(pathToFileURL(find("node-llama-cpp")));
const {Template} = await import(pathToFileURL(find("@huggingface/jinja")));
const llama = await getLlama({gpu: false, build: "never"});
const model = await llama.loadModel({modelPath: file});
const template = new Template(model.fileInfo.metadata.tokenizer.chat_template);
const context = await model.createContext({contextSize: 1024, threads: 1}); // threads that wait burn a busy machine
const sequence = context.getSequence();
for (const content of questions) {
  const prompt = template.render({messages: [{role: "user", content}], add_generation_prompt: true});
  const answer = [];
  await sequence.clearHistory();
  for await (const token of sequence.evaluate(model.tokenize(prompt, true), {temperature: 0})) {
    if (model.isEogToken(token) || answer.length === 512) break;
    answer.push(token);
  }
  console.log(JSON.stringify(model.detokenize(answer)));
}
process.exit(0);
